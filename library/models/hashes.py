"""Hashes by which other programs recognise models and networks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from library.models.checkpoint_writer import file_order, pending, safetensors_header, tensor_bytes

_LEGACY_OFFSET, _LEGACY_LENGTH = 0x100000, 0x10000
_BLOCK = 1 << 20
NO_FILE, IS_DIRECTORY = "NOFILE", "IsADirectory"


def model_hash(filename: str | Path) -> str:
    """Old short hash of a file: 8 hex digits from 64 KiB at 1 MiB; `NOFILE`, `IsADirectory`."""
    return _of_file(filename, legacy_hash_of)


def calculate_sha256(filename: str | Path) -> str:
    """SHA-256 of a whole file in hex; `NOFILE`, `IsADirectory`."""
    return _of_file(filename, lambda file: _sha256_of(file).hexdigest())


def file_hashes(filename: str | Path) -> tuple[str, str]:
    """(`model_hash`, `calculate_sha256`) from one pass over the file."""

    def both(file: IO[bytes]) -> tuple[str, str]:
        whole = _sha256_of(file).hexdigest()
        return legacy_hash_of(file), whole

    result = _of_file(filename, both)
    return result if isinstance(result, tuple) else (result, result)


def _of_file(filename, function):
    try:
        with open(filename, "rb") as file:
            return function(file)
    except FileNotFoundError:
        return NO_FILE
    except (IsADirectoryError, PermissionError):  # Windows answers PermissionError for a folder
        return IS_DIRECTORY


def _sha256_of(file: IO[bytes]) -> hashlib._Hash:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest


def legacy_hash_of(b: IO[bytes]) -> str:
    """The old short hash of an opened file or bytes object, wherever it stands."""
    b.seek(_LEGACY_OFFSET)
    return hashlib.sha256(b.read(_LEGACY_LENGTH)).hexdigest()[:8]


def safetensors_data_hash_of(b: IO[bytes]) -> str:
    """SHA-256 of the data part of an opened safetensors file."""
    b.seek(0)
    length = int.from_bytes(b.read(8), "little")
    b.seek(8 + length)
    return _sha256_of(b).hexdigest()


def network_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a network, as it would be written with its `ss_*` metadata alone.

    Nothing is serialised: the tensors' bytes are hashed where they lie, in the order of the file.
    """
    items = file_order(pending(name, tensor) for name, tensor in tensors.items())
    header = safetensors_header(items, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    whole, window = hashlib.sha256(), hashlib.sha256(_window(header, 0))
    position = len(header)
    for item in items:
        data = tensor_bytes(item.make(), item.dtype)
        whole.update(data)
        window.update(_window(data, position))
        position += len(data)
    return whole.hexdigest(), window.hexdigest()[:8]


def _window(data: bytes | memoryview, position: int) -> bytes | memoryview:
    """What of `data`, which starts at `position` of the file, lies in the window of the legacy hash."""
    start = max(0, _LEGACY_OFFSET - position)
    end = max(0, _LEGACY_OFFSET + _LEGACY_LENGTH - position)
    return data[start:end]


def load_bytes_in_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The data part of these tensors' safetensors file."""
    items = file_order(pending(name, tensor) for name, tensor in tensors.items())
    return b"".join(bytes(tensor_bytes(item.make(), item.dtype)) for item in items)


def hash_of_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """`0x` + SHA-256 over the bytes of the tensors in the order of the dictionary."""
    digest = hashlib.sha256()
    for tensor in state_dict.values():
        digest.update(tensor_bytes(tensor, tensor.dtype))
    return "0x" + digest.hexdigest()


def update_hash_sha256(metadata: dict[str, str], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Kept for old callers; the hash is written by the writer of the file."""
    raise NotImplementedError("the hash is computed while a file is written")
