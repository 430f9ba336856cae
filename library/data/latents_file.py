"""Latent cache files: the arrays of sd-scripts' `.npz`, and a key beside them that tells whether they still hold.

`latents` float32 (4, H/8, W/8), `original_size` int64 (width, height), `crop_ltrb` float64 (4), optional
`latents_flipped` and `alpha_mask` float32 (H, W). The key is one more array, `cache_key`, a JSON text: what the
latents were made from and how. Other programs ignore it; their files have none and are judged by their arrays.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from library.data.buckets import Size
from library.messages import UserError
from library.runtime.files import atomic_path

OWN_ARRAYS = ("latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask", "cache_key")
HASH_BLOCK = 1 << 20
FINGERPRINT_VALUES = 16
FLOAT_BYTES = 4
# Small arrays, the key and the container of one cache file.
FILE_BYTES = 1800
# Enough of a `.npy` file for its shape.
HEADER_BYTES = 256
_LOCAL_HEADER = struct.Struct("<4s22s4s")
# What reading a damaged file raises.
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True, slots=True)
class CachedLatents:
    """Latents of one picture, not multiplied by the family's scale.

    Attributes:
        latents, flipped: (4, H/8, W/8); `flipped` are those of the mirrored picture, or None.
        original: (width, height) of the picture file.
        ltrb: crop numbers, see `library.data.buckets.crop_ltrb`.
        mask: float32 (H, W) in [0, 1] from the alpha channel, or None.
    """

    latents: torch.Tensor
    original: Size
    ltrb: tuple[float, float, float, float]
    flipped: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a cache file should hold.

    Attributes:
        source: the picture file.
        bucket, resized: training size, and size before the crop.
        interpolation: how it is resized.
        flip: mirrored latents are needed.
        alpha: the alpha mask is needed.
        family: `sd` or `sdxl`.
        vae: identity of the VAE; empty: unknown, not compared.
        dtype: the VAE computes in it; empty: not compared.
        orientation: how the stored pixels are turned before anything else, 1: not at all.
    """

    source: str
    bucket: Size
    resized: Size
    interpolation: str = "area"
    flip: bool = False
    alpha: bool = False
    family: str = "sd"
    vae: str = ""
    dtype: str = ""
    orientation: int = 1


@dataclass(frozen=True, slots=True)
class SourceState:
    """State of a picture file when its latents were made."""

    size: int
    mtime_ns: int
    hash: str


def source_state(path: str | os.PathLike[str]) -> SourceState:
    """Size, time and content hash of a file; taken before it is decoded, so that a later change shows."""
    status = os.stat(path)
    return SourceState(status.st_size, status.st_mtime_ns, content_hash(path))


def content_hash(path: str | os.PathLike[str]) -> str:
    """BLAKE2b-128 of a file's bytes, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def key_text(wanted: Wanted, state: SourceState) -> str:
    """The `cache_key` of latents made as wanted from a picture in this state."""
    key = asdict(wanted)
    del key["source"], key["flip"], key["alpha"]
    if wanted.orientation == 1:  # as in files from before pictures were turned
        del key["orientation"]
    return json.dumps({"version": 1, **key, "source": asdict(state)})


def read_latents(path: str | os.PathLike[str]) -> CachedLatents:
    """Read a cache file of this or of the original program; all arrays as float32.

    Raises:
        UserError: broken, missing, or of an older format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in OWN_ARRAYS and name != "cache_key"}
    except UNREADABLE as error:
        raise UserError(
            f"cannot read latent cache {path} ({error})", "delete the file and start again, it is made anew"
        ) from error
    missing = [name for name in ("latents", "original_size", "crop_ltrb") if name not in arrays]
    if missing:
        raise UserError(f"latent cache {path} has no {missing[0]}", "delete the file and start again, it is made anew")
    width, height = (int(side) for side in arrays["original_size"])
    left, top, right, bottom = (float(edge) for edge in arrays["crop_ltrb"])
    return CachedLatents(
        _float_tensor(arrays["latents"]),
        (width, height),
        (left, top, right, bottom),
        _float_tensor(arrays["latents_flipped"]) if "latents_flipped" in arrays else None,
        _float_tensor(arrays["alpha_mask"]) if "alpha_mask" in arrays else None,
    )


def _float_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def write_latents(path: str | os.PathLike[str], entry: CachedLatents, key: str | None = None) -> None:
    """Write a cache file as a whole or not at all; arrays of other programs in an existing file stay.

    Args:
        path: the `.npz`.
        entry: its content; latents are stored as float32.
        key: see `key_text`; None: no key.
    """
    arrays: dict[str, Any] = {
        "latents": entry.latents.float().cpu().numpy(),
        "original_size": np.array(entry.original, dtype=np.int64),
        "crop_ltrb": np.array(entry.ltrb, dtype=np.float64),
    }
    if entry.flipped is not None:
        arrays["latents_flipped"] = entry.flipped.float().cpu().numpy()
    if entry.mask is not None:
        arrays["alpha_mask"] = entry.mask.float().cpu().numpy()
    if key is not None:
        arrays["cache_key"] = np.array(key)
    arrays |= _foreign_arrays(Path(path))
    with atomic_path(path) as partial:
        np.savez(partial, **arrays)


def _foreign_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in OWN_ARRAYS}
    except UNREADABLE:
        return {}


@dataclass(frozen=True, slots=True)
class Header:
    """What a cache file says without its numbers: shapes by array name, and its key if it has one."""

    shapes: dict[str, tuple[int, ...]]
    key: dict[str, Any] | None


def read_header(path: str | os.PathLike[str]) -> Header | None:
    """Shapes and key of a cache file; None if it cannot be read."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            shapes, key = {}, None
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename:
                    continue
                if name != "cache_key":
                    shapes[name] = _shape(_start_of(info, file, archive, HEADER_BYTES))
                    continue
                key = json.loads(_text(_start_of(info, file, archive, info.file_size)))
                if not isinstance(key, dict):
                    return None
            return Header(shapes, key)
    except UNREADABLE:
        return None


def _start_of(info: zipfile.ZipInfo, file: BinaryIO, archive: zipfile.ZipFile, count: int) -> bytes:
    """The first bytes of an array's file.

    Arrays that are not compressed are read past `zipfile`, which takes several times as long; a start of a hundred
    thousand pictures notices that.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            return member.read(count)
    file.seek(info.header_offset)
    mark, names = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))[::2]
    if mark != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no array at {info.header_offset}")
    file.seek(sum(struct.unpack("<HH", names)), os.SEEK_CUR)
    return file.read(min(count, info.file_size))


def _shape(data: bytes) -> tuple[int, ...]:
    """Shape in the header of a `.npy` file."""
    found = re.search(rb"'shape': \(([\d, ]*)\)", data)
    if data[:6] != b"\x93NUMPY" or found is None:
        raise ValueError("no array")
    return tuple(int(side) for side in found.group(1).split(b",") if side.strip())


def _text(data: bytes) -> str:
    """The one text in a `.npy` file."""
    return str(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))


def original_accepts(bucket: Size, path: str | os.PathLike[str], flip: bool) -> bool:
    """The original's own test of a cache file: its arrays are there and have the bucket's size.

    Args:
        bucket: (width, height).
        path: the `.npz`.
        flip: mirrored latents are needed.
    """
    header = read_header(path)
    if header is None or not {"latents", "original_size", "crop_ltrb"} <= header.shapes.keys():
        return False
    names = ("latents", "latents_flipped") if flip else ("latents",)
    expected = (bucket[1] // 8, bucket[0] // 8)
    return all(header.shapes.get(name, ())[1:3] == expected for name in names)


VALID = "valid"
MOVED = "valid, source moved"
ABSENT = "absent"
OTHER = "of another size or family"
BROKEN = "broken file"
OLDER = "older format"
PICTURE_CHANGED = "picture changed"


def judge(path: str | os.PathLike[str], wanted: Wanted, *, skip_check: bool = False) -> str:
    """Whether a cache file holds what is wanted.

    Args:
        path: the `.npz`.
        wanted: what it should hold.
        skip_check: any existing file will do.

    Returns:
        `VALID`; `MOVED`: valid, but the picture's file time changed while its content did not; `ABSENT`; `OTHER`:
        the file serves another training size or family and must stay; else the reason why it must be made anew.
    """
    if not os.path.exists(path):
        return ABSENT
    if skip_check:
        return VALID
    header = read_header(path)
    if header is None:
        return BROKEN
    if "latents" not in header.shapes:
        return OLDER
    if header.key is None:
        return _judge_foreign(path, header, wanted)
    key = header.key
    if (key.get("bucket"), key.get("family")) != (list(wanted.bucket), wanted.family):
        return OTHER
    if (reason := _missing(header, wanted)) is not None:
        return reason
    if key.get("version") != 1 or key.get("interpolation") != wanted.interpolation:
        return "other settings"
    if key.get("orientation", 1) != wanted.orientation:
        return "turned otherwise"
    if wanted.vae and key.get("vae") and key["vae"] != wanted.vae:
        return "other VAE"
    if wanted.dtype and key.get("dtype") and key["dtype"] != wanted.dtype:
        return "other precision"
    source = judge_source(wanted.source, key.get("source") or {})
    if source in (VALID, MOVED) and key.get("resized") != list(wanted.resized):
        return "other settings"
    return source


def _judge_foreign(path: str | os.PathLike[str], header: Header, wanted: Wanted) -> str:
    if header.shapes["latents"][1:3] != (wanted.bucket[1] // 8, wanted.bucket[0] // 8):
        return OTHER
    if (reason := _missing(header, wanted)) is not None:
        return reason
    if wanted.orientation != 1:  # other programs cache pictures as stored
        return "turned otherwise"
    return VALID if original_accepts(wanted.bucket, path, wanted.flip) else OLDER


def _missing(header: Header, wanted: Wanted) -> str | None:
    if wanted.flip and "latents_flipped" not in header.shapes:
        return "no flipped latents"
    if wanted.alpha and header.shapes.get("alpha_mask") != (wanted.bucket[1], wanted.bucket[0]):
        return "no alpha mask"
    return None


def judge_source(path: str, known: dict[str, Any]) -> str:
    """`VALID`, `MOVED` or why a picture is not the one that a key's `source` describes; one that is gone is valid."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return VALID
    if (status.st_size, status.st_mtime_ns) == (known.get("size"), known.get("mtime_ns")):
        return VALID
    if status.st_size != known.get("size"):
        return PICTURE_CHANGED
    return MOVED if content_hash(path) == known.get("hash") else PICTURE_CHANGED


def fingerprint(module: Any) -> str:
    """Identity of a model from names, shapes and a few values of every tensor, the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().flatten()
        step = max(1, values.numel() // FINGERPRINT_VALUES)
        digest.update(values[::step].to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()
