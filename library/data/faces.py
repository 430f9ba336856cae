"""Cuts out the faces of pictures, upright if wanted; file names state where the face is, for face crops in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from library.data.face_detectors import Detector, FoundFace, make_detector
from library.data.images import encoded, read_upright
from library.data.picture_check import file_and_reason
from library.data.picture_search import find_pictures
from library.messages import UserError, log, progress, some
from library.options.data_tools import FacesConfig
from library.runtime.files import atomic_write, make_folder

BOX_COLOUR = (255, 0, 255)  # BGR


@dataclass(slots=True)
class Face:
    """A face in a picture: centre and size in pixels, angle of its eyes in degrees (None: not known)."""

    x: int
    y: int
    width: int
    height: int
    angle: float | None

    @property
    def size(self) -> int:
        return max(self.width, self.height)


@dataclass(frozen=True, slots=True)
class Cut:
    """How much around a face is cut out.

    Attributes:
        size: (width, height) in pixels, or None.
        ratio: (width, height) in multiples of the face's size, or None.
        face_size: the face's size after scaling, or None.
        fit: scale so that one side of the picture fits the cut.
    """

    size: tuple[int, int] | None = None
    ratio: tuple[float, float] | None = None
    face_size: int | None = None
    fit: bool = False


def cut_faces(config: FacesConfig) -> int:
    """Write every face of every picture in a folder.

    Returns:
        files written.

    Raises:
        UserError: options that are missing or contradict each other, a detector or folder that cannot be used.
    """
    cut = _cut_of(config)
    assert config.src_dir and config.dst_dir, "checked with the options"
    if config.rotate and config.detector == "cascade":
        raise UserError("--rotate with --detector cascade", "a cascade knows no eyes: leave --rotate out")
    pictures = find_pictures(config.src_dir)
    detector = make_detector(config.detector, config.cascade_file, config.detections_file)
    make_folder(config.dst_dir)
    unreadable: list[str] = []
    written = 0
    for path in progress(pictures, "pictures"):
        try:
            image = np.ascontiguousarray(read_upright(path)[..., ::-1])
        except UserError as error:
            unreadable.append(file_and_reason(error))
            continue
        written += _write_faces(image, Path(path), detector, cut, config)
    if unreadable:
        log.warning("%d pictures are left out: %s", len(unreadable), some(unreadable))
    if pictures and len(unreadable) == len(pictures):
        raise UserError(f"no picture in {config.src_dir} can be read", "see the files named above")
    log.info("%s: %d faces of %d pictures", config.dst_dir, written, len(pictures) - len(unreadable))
    return written


def _cut_of(config: FacesConfig) -> Cut:
    for other in ("resize_fit", "crop_ratio"):
        if config.resize_face_size and getattr(config, other):
            raise UserError(f"--{other} and --resize_face_size exclude each other", "leave one of them out")
    if (config.resize_face_size or config.resize_fit) and not (config.crop_size or config.crop_ratio):
        name = "resize_face_size" if config.resize_face_size else "resize_fit"
        log.warning("--%s has no effect without --crop_size", name)
    size, ratio = _pair(config, "crop_size"), _pair(config, "crop_ratio")
    whole = None if size is None else (int(size[0]), int(size[1]))
    return Cut(whole, ratio, config.resize_face_size, config.resize_fit)


def _pair(config: FacesConfig, name: str) -> tuple[float, float] | None:
    text = getattr(config, name)
    if text is None:
        return None
    try:
        numbers = [int(part) if name == "crop_size" else float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not min(numbers) > 0:
        example = "512,768" if name == "crop_size" else "2.0,3.0"
        raise UserError(f"--{name} {text} cannot be read", f"give two numbers, such as {example}")
    return numbers[0], numbers[1]


def _write_faces(image: np.ndarray, path: Path, detector: Detector, cut: Cut, config: FacesConfig) -> int:
    written = 0
    for rank, face in enumerate(sorted_faces(detector(path.name, image), config.score_threshold), 1):
        if face.size == 0 or face.size < (config.min_size or 0) or face.size >= (config.max_size or math.inf):
            continue
        result, placed = cut_face(image, face, cut, rotate=config.rotate)
        if config.debug:
            _draw_box(result, placed)
        number = f"_{rank:02d}" if config.multiple_faces else ""
        place = "_".join(f"{value:04d}" for value in (placed.x, placed.y, placed.width, placed.height))
        with atomic_write(Path(str(config.dst_dir), f"{path.stem}{number}_{place}.png")) as file:
            file.write(encoded(result, ".png"))
        written += 1
    return written


def sorted_faces(found: Sequence[FoundFace], threshold: float) -> list[Face]:
    """Faces of which the detector is sure, the largest first."""
    faces = []
    for one in found:
        if one.score < threshold:
            continue
        left, top, right, bottom = one.box
        angle = None
        if one.right_eye is not None and one.left_eye is not None:
            angle = math.degrees(math.atan2(one.left_eye[1] - one.right_eye[1], one.left_eye[0] - one.right_eye[0]))
        faces.append(
            Face(int((left + right) / 2), int((top + bottom) / 2), int(right - left), int(bottom - top), angle)
        )
    return sorted(faces, key=lambda face: -face.size)


def cut_face(image: np.ndarray, face: Face, cut: Cut, *, rotate: bool = False) -> tuple[np.ndarray, Face]:
    """The picture turned and cut around a face, and where the face is in the result.

    Args:
        image: uint8 (H, W, 3).
        face: where it is, of a size above 0.
        cut: without size and ratio the whole picture stays.
        rotate: level the eyes, where they are known.
    """
    if rotate and face.angle is not None:
        image = _rotated(image, face)
    if cut.size is None and cut.ratio is None:
        return image, face
    if cut.size is not None:
        wanted = cut.size
    else:
        assert cut.ratio is not None
        wanted = (int(face.size * cut.ratio[0] + 0.5), int(face.size * cut.ratio[1] + 0.5))
    scale = _scale((image.shape[1], image.shape[0]), face, wanted, cut)
    if scale != 1.0:
        image, face = _scaled(image, face, scale)
    (left, right), x = _span(face.x, wanted[0], image.shape[1])
    (top, bottom), y = _span(face.y, wanted[1], image.shape[0])
    return image[top:bottom, left:right], Face(x, y, face.width, face.height, face.angle)


def _rotated(image: np.ndarray, face: Face) -> np.ndarray:
    assert face.angle is not None
    matrix = cv2.getRotationMatrix2D((face.x, face.y), face.angle, 1.0)
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _scale(size: tuple[int, int], face: Face, wanted: tuple[int, int], cut: Cut) -> float:
    needed = (wanted[0] / size[0], wanted[1] / size[1])
    if cut.face_size is not None:
        scale = cut.face_size / face.size
        if scale < max(needed):
            log.info("the face stays larger than %d pixels, so that the picture covers the cut", cut.face_size)
        return max(scale, *needed)
    if cut.size is None:
        return 1.0
    if cut.fit:
        return max(needed)
    scale = 1.0
    for ratio, side, name in zip(needed, size, ("width", "height"), strict=True):
        if ratio > 1:
            log.info("the picture's %s of %d pixels is below that of the cut: it is enlarged", name, side)
            scale = ratio
    return scale


def _scaled(image: np.ndarray, face: Face, scale: float) -> tuple[np.ndarray, Face]:
    size = (int(image.shape[1] * scale + 0.5), int(image.shape[0] * scale + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)
    x, y, width, height = (int(value * scale + 0.5) for value in (face.x, face.y, face.width, face.height))
    return image, Face(x, y, width, height, face.angle)


def _span(centre: int, wanted: int, length: int) -> tuple[tuple[int, int], int]:
    """(start, end) of the cut along one side, inside the picture, and the centre's place in it."""
    wanted = min(wanted, length)
    start = max(0, min(centre - wanted // 2, length - wanted))
    return (start, start + wanted), centre - start


def _draw_box(image: np.ndarray, face: Face) -> None:
    """In place: where faces are near each other, later results show the boxes of earlier ones."""
    corner = (face.x - face.width // 2, face.y - face.height // 2)
    opposite = (face.x + face.width // 2, face.y + face.height // 2)
    cv2.rectangle(image, corner, opposite, BOX_COLOUR, face.width // 20)
