"""Pictures: reading, resizing, cropping, flips and colour changes, and the numbers that describe the crop.

Arrays are uint8, height x width x 3 (RGB) or 4 (RGBA). Sizes are (width, height).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from library.data.buckets import Size
from library.data.listing import picture_suffixes
from library.data.orientation import AS_STORED, orientation_of, turn
from library.messages import UserError

OPENCV_METHODS = {
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


def read_image(path: str | os.PathLike[str], *, alpha: bool = False, orientation: int = AS_STORED) -> np.ndarray:
    """Pixels of a picture file.

    Args:
        path: the file.
        alpha: give a fourth channel, 255 everywhere if the file has no transparency.
        orientation: how the stored pixels are turned, see `library.data.orientation`.

    Returns:
        uint8 (height, width, 3 or 4). Colours under transparent pixels stay as stored.

    Raises:
        UserError: the file cannot be read; it names the file.
    """
    picture_suffixes()  # teaches Pillow the formats of plug-ins, once a process
    try:
        with Image.open(path) as file:
            pixels = _rgb(file)
            if not alpha:
                return turn(pixels, orientation)
            if has_alpha_channel(file):
                mask = np.asarray(file.convert("RGBA").getchannel("A"))
            else:
                mask = np.full(pixels.shape[:2], 255, dtype=np.uint8)
            return turn(np.dstack([pixels, mask]), orientation)
    except FileNotFoundError:
        raise UserError(f"picture not found: {path}", "restore it, or start again without it") from None
    except Exception as error:  # Pillow's plug-ins raise many kinds, SyntaxError among them
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read picture {path} ({reason})", "replace or remove the file") from error


def read_upright(path: str | os.PathLike[str]) -> np.ndarray:
    """Pixels of a picture file, turned as its EXIF data say; see `read_image`."""
    try:
        orientation = orientation_of(path)
    except OSError:  # `read_image` says what is wrong with the file
        orientation = AS_STORED
    return read_image(path, orientation=orientation)


def encoded(image: np.ndarray, suffix: str) -> bytes:
    """A picture file's bytes, in OpenCV's order of channels (BGR) or grey; encoded in memory, for any file name."""
    done, data = cv2.imencode(suffix, image)
    if not done:
        raise UserError(f"OpenCV cannot write {suffix} files", "choose .png")
    return data.tobytes()


def has_alpha_channel(file: Image.Image) -> bool:
    """Whether an open picture file has transparency, by its header."""
    return "A" in file.getbands() or "transparency" in file.info


def _rgb(file: Image.Image) -> np.ndarray:
    """The pixels as RGB; of 16-bit grey the upper 8 bits, which Pillow's own conversion would clip to white."""
    if file.mode == "RGB":
        return np.asarray(file)
    if file.mode.startswith("I") and file.format == "PNG":
        grey = (np.asarray(file).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if isinstance(file.info.get("transparency"), bytes):  # Pillow warns when it drops the alpha of a palette
        return np.ascontiguousarray(np.asarray(file.convert("RGBA"))[..., :3])
    return np.asarray(file.convert("RGB"))


def resize(image: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """The picture in another size.

    Args:
        image: (height, width, channels).
        size: (width, height) wanted.
        interpolation: None or `area` (also where the picture grows), `lanczos` (Pillow), `nearest`, `bilinear` or
            `linear`, `bicubic` or `cubic`, or `auto`: area where both sides shrink, else Lanczos.
    """
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    method = interpolation or "area"
    if method == "auto":
        method = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if method == "lanczos":
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    if method not in OPENCV_METHODS:
        choices = ", ".join(sorted([*OPENCV_METHODS, "auto", "lanczos"]))
        raise UserError(f"unknown resize_interpolation {method!r}", f"choose one of {choices}")
    return cv2.resize(image, size, interpolation=OPENCV_METHODS[method])


def crop_to_bucket(
    image: np.ndarray,
    bucket: Size,
    resized: Size,
    *,
    draw: random.Random | None = None,
    interpolation: str | None = None,
) -> tuple[np.ndarray, Size]:
    """Resize, then cut to the bucket: in the middle, or anywhere if `draw` is given.

    Returns:
        the picture in the bucket's size, and (left, top) of the cut in the resized picture.
    """
    image = resize(image, resized, interpolation)
    offsets = [0, 0]
    for axis, (length, target) in enumerate(zip(resized, bucket, strict=True)):
        if length > target:
            offsets[axis] = draw.randint(0, length - target) if draw else (length - target) // 2
    left, top = offsets
    image = image[top : top + bucket[1], left : left + bucket[0]]
    if image.shape[:2] != (bucket[1], bucket[0]):
        raise ValueError(f"resized size {resized} does not cover bucket {bucket}")
    return image, (left, top)


@dataclass(frozen=True, slots=True)
class Face:
    """A face in a picture, pixels: centre and size."""

    x: int
    y: int
    width: int
    height: int


def face_in_name(path: str | os.PathLike[str]) -> Face | None:
    """The face that a file name of the form `name_cx_cy_w_h.ext` states; None if it states none."""
    pieces = Path(path).stem.split("_")
    if len(pieces) < 5:
        return None
    try:
        face = Face(*(int(piece) for piece in pieces[-4:]))
    except ValueError:
        return None
    return face if face.x > 0 and max(face.width, face.height) > 0 else None


def crop_exact(image: np.ndarray, base: Size, draw: random.Random | None, path: str) -> np.ndarray:
    """Without buckets: the picture must have the base size, or be larger and cut anywhere if `draw` is given.

    Raises:
        UserError: the size does not fit.
    """
    height, width = image.shape[:2]
    if draw and (width > base[0] or height > base[1]):
        if height > base[1]:
            top = draw.randint(0, height - base[1])
            image = image[top : top + base[1]]
        if width > base[0]:
            left = draw.randint(0, width - base[0])
            image = image[:, left : left + base[0]]
    if image.shape[:2] != (base[1], base[0]):
        raise UserError(
            f"picture {path} is {width}x{height}, but without buckets every picture must be {base[0]}x{base[1]}",
            "use --enable_bucket, or resize the pictures",
        )
    return image


def crop_around_face(
    image: np.ndarray,
    base: Size,
    face: Face,
    face_range: tuple[float, float],
    draw: random.Random,
    *,
    random_crop: bool = False,
    interpolation: str | None = None,
    path: str = "",
) -> tuple[np.ndarray, Size, Size]:
    """Without buckets: scale so that the face takes up a drawn share of the picture, and cut around it.

    Args:
        image: (height, width, channels).
        base: size wanted.
        face: where the face is, in pixels of `image`.
        face_range: the training size is between these multiples of the face.
        draw: generator of the scale, then of the vertical and the horizontal offset.
        random_crop: move the cut far around the face instead of a little.
        interpolation: see `resize`.
        path: for messages.

    Returns:
        the picture in base size, the size after scaling, (left, top) of the cut in it.

    Raises:
        UserError: the picture cannot cover the base size without being enlarged.
    """
    height, width = image.shape[:2]
    if (width, height) == base:
        return image, base, (0, 0)
    face_size = max(face.width, face.height)
    shorter = min(base)
    low, high = face_range
    smallest = min(1.0, max(base[1] / height, base[0] / width, shorter / (face_size * high)))
    largest = min(1.0, max(smallest, shorter / (face_size * low)))
    scale = smallest if smallest >= largest else draw.uniform(smallest, largest)
    scaled = (int(width * scale + 0.5), int(height * scale + 0.5))
    if scaled[0] < base[0] or scaled[1] < base[1]:
        raise UserError(
            f"picture {path} is {width}x{height}, smaller than the training size {base[0]}x{base[1]}",
            "use larger pictures, or lower --resolution",
        )
    image = resize(image, scaled, interpolation)
    centre = (int(face.x * scale + 0.5), int(face.y * scale + 0.5))
    offsets = [0, 0]
    for axis in (1, 0):
        length, target, middle = scaled[axis], base[axis], centre[axis]
        offset = middle - target // 2
        if random_crop:
            reach = max(length - middle, middle)
            offset += draw.randint(0, reach) + draw.randint(0, reach) - reach
        elif low != high and face_size > shorter // 10 and face_size >= 40:
            offset += draw.randint(-face_size // 20, face_size // 20)
        offsets[axis] = max(0, min(offset, length - target))
    left, top = offsets
    return image[top : top + base[1], left : left + base[0]], scaled, (left, top)


def augment_color(image: np.ndarray, draw: random.Random) -> np.ndarray:
    """Leave two pictures of three alone; change the hue or the gamma of the others a little.

    The hue axis is that of BGR data and gamma works on 0..255 without normalising, as the original does.
    """
    if draw.random() > 0.33:
        return image
    colours, rest = image[..., :3], image[..., 3:]
    if draw.random() > 0.5:
        shift = draw.uniform(-8, 8)
        if shift < 0:
            shift = 180 + shift
        hsv = cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_BGR2HSV)
        hsv[..., 0] = ((hsv[..., 0].astype(np.float64) + shift) % 180).astype(np.uint8)
        colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    else:
        table = np.arange(256, dtype=np.float64) ** draw.uniform(0.95, 1.05)
        colours = np.clip(table, 0, 255).astype(np.uint8)[colours]
    return np.concatenate([colours, rest], axis=2) if rest.shape[2] else colours


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1], contiguous."""
    # A copy: flipped arrays have negative strides and arrays of Pillow are read-only, torch takes neither.
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(torch.float32)
    return tensor.div_(255).sub_(0.5).div_(0.5)


def alpha_mask(image: np.ndarray) -> torch.Tensor:
    """Fourth channel of an RGBA picture as float32 (H, W) in [0, 1]."""
    return torch.from_numpy(image[..., 3].copy()).to(torch.float32).div_(255)


def crop_top_left(ltrb: tuple[float, float, float, float] | None, target: Size, flipped: bool) -> Size:
    """(top, left) that SDXL is told, from the crop numbers of `library.data.buckets.crop_ltrb`.

    Args:
        ltrb: (left, top, right, bottom), or None where no crop is reported (no buckets).
        target: size of the training picture.
        flipped: the picture is mirrored.
    """
    if ltrb is None:
        return 0, 0
    left, top, right, _ = ltrb
    return int(top), int(target[0] - right if flipped else left)
