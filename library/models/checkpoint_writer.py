"""Writing model files: planned first, room checked, then tensor by tensor, under the final name only at the end."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.models.checkpoint import DTYPES
from library.runtime.files import atomic_path, check_room

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
# safetensors stores wide formats first; within a format by name. Hashes of the data depend on this order.
_RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Pending:
    """A tensor that will be written: what the header says of it, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def pending(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Pending:
    """A tensor to write under `name`, floating ones as `dtype` (None: as it is)."""
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Pending(name, target, tuple(tensor.shape), lambda: tensor)


def file_order(items: Iterable[Pending]) -> list[Pending]:
    """The order in which safetensors lays tensors out."""
    return sorted(items, key=lambda item: (-_RANK[item.dtype], item.name))


def safetensors_header(items: Iterable[Pending], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON header of a safetensors file for items in file order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for item in items:
        header[item.name] = {
            "dtype": _WORDS[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.size],
        }
        offset += item.size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def tensor_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """A tensor's little-endian bytes, on the CPU and cast first."""
    tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    path: str | Path, items: Iterable[Pending], metadata: Mapping[str, str] | None = None, hash_key: str | None = None
) -> int:
    """Write a safetensors file atomically, one tensor in memory at a time.

    Args:
        items: in any order.
        metadata: texts of the header.
        hash_key: metadata key that receives `0x` + SHA-256 of the data part, computed in the same pass.

    Returns:
        Number of tensors.

    Raises:
        UserError: no room on the disk, or the folder may not be written.
    """
    path = Path(path)
    ordered = file_order(items)
    texts = {str(k): str(v) for k, v in (metadata or {}).items()}
    if hash_key:
        texts[hash_key] = "0x" + "0" * 64
    header = safetensors_header(ordered, texts)
    check_room(path.parent, len(header) + sum(item.size for item in ordered))
    digest = hashlib.sha256()
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(header)
        for item in ordered:
            data = tensor_bytes(item.make(), item.dtype)
            file.write(data)
            if hash_key:
                digest.update(data)
        if hash_key:
            texts[hash_key] = "0x" + digest.hexdigest()
            file.seek(0)
            file.write(safetensors_header(ordered, texts))
    return len(ordered)


def write_pickle(path: str | Path, items: Iterable[Pending], wrapper: Mapping[str, Any] | None = None) -> int:
    """Write a torch pickle atomically: the tensors, or `{"state_dict": tensors, **wrapper}`.

    Returns:
        Number of tensors.

    Raises:
        UserError: no room on the disk, or the folder may not be written.
    """
    path = Path(path)
    items = list(items)
    check_room(path.parent, sum(item.size for item in items))
    state = {i.name: i.make().detach().to(device="cpu", dtype=i.dtype).contiguous() for i in items}
    content = state if wrapper is None else {"state_dict": state, **wrapper}
    with atomic_path(path) as partial:
        torch.save(content, partial)
    return len(items)


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors to a file of the kind that its suffix says: safetensors (any case), else a torch pickle.

    Args:
        metadata: safetensors only; pickles hold no texts.
        dtype: of floating tensors; None leaves them.
    """
    items = [pending(name, tensor, dtype) for name, tensor in tensors.items()]
    if Path(path).suffix.lower() == ".safetensors":
        write_safetensors(path, items, metadata)
    else:
        write_pickle(path, items)
