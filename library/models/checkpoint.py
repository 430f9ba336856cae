"""Model files: opened by their header, read tensor by tensor, written whole or not at all.

safetensors files are read by plain sequential reads straight into each tensor's memory, so that a file is never
held twice. Pickles (`.ckpt`, `.pt`, `.bin`) are read with `weights_only=True` alone: nothing in them can run.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_MAX_HEADER = 100_000_000
# Classes that old trainers leave beside the weights; they become inert stand-ins, everything else is refused.
_STAND_IN_ROOTS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file's directory describes it; `begin` is an absolute offset (safetensors only)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """An opened model file.

    Attributes:
        path: where it lies.
        tensors: name -> dtype and shape, in the order of the file.
        metadata: texts of the header; empty for pickles.
        epoch, global_step: as a wrapped pickle has them, else None.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata or {}
        self.epoch: Any = None
        self.global_step: Any = None

    def stream(
        self,
        names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) one by one in the order of the file.

        Args:
            names: which tensors; None for all.
            dtype: for floating tensors; integers keep theirs.
            device: where each tensor goes as soon as it is read.
        """
        wanted = set(self.tensors if names is None else names)
        for name, tensor in self._read(wanted):
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            yield name, tensor.to(device=device, dtype=target)

    def read(
        self,
        names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        """The same as a dictionary."""
        return dict(self.stream(names, dtype=dtype, device=device))

    def _read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError


class SafetensorsCheckpoint(Checkpoint):
    """A `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        header, data_start = _read_header(path)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
        tensors = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
        super().__init__(path, tensors, {str(k): str(v) for k, v in metadata.items()})
        end = max((info.begin + info.size for info in tensors.values()), default=data_start)
        size = path.stat().st_size
        if size < end:
            raise UserError(f"{path} is truncated ({size} of {end} bytes)", "copy or download the file again")

    def _read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        with open(self.path, "rb", buffering=0) as file:
            position = 0
            for name, info in self.tensors.items():
                if name not in names:
                    continue
                if position != info.begin:
                    file.seek(info.begin)
                tensor = torch.empty(info.shape, dtype=info.dtype)
                if info.size:
                    _fill(file, tensor, self.path)
                position = info.begin + info.size
                yield name, tensor


class PickleCheckpoint(Checkpoint):
    """A torch pickle: a dictionary of tensors, or one with the item `state_dict`."""

    def __init__(self, path: Path) -> None:
        content = _load_pickle(path)
        state = content.get("state_dict", content)
        if not isinstance(state, Mapping):
            raise UserError(f"{path} holds no model weights", "give a file with a dictionary of tensors")
        self._state = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if not self._state:
            raise UserError(f"{path} holds no model weights", "give a file with a dictionary of tensors")
        super().__init__(path, {k: TensorInfo(v.dtype, tuple(v.shape)) for k, v in self._state.items()})
        self.is_wrapped = "state_dict" in content
        self.epoch = content.get("epoch")
        self.global_step = content.get("global_step")

    def _read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state.items():
            if name in names:
                yield name, tensor.detach().clone()  # the file is memory-mapped: nothing may go on pointing into it


class JoinedCheckpoint(Checkpoint):
    """Several files that together hold one model (a sharded diffusers part)."""

    def __init__(self, path: Path, parts: Sequence[Checkpoint]) -> None:
        super().__init__(path, {name: info for part in parts for name, info in part.tensors.items()})
        self._parts = parts

    def _read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for part in self._parts:
            yield from part._read(names & part.tensors.keys())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model file; its content, not its suffix, says what kind it is.

    Raises:
        UserError: missing, empty, truncated, not a model file, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"model file {path} does not exist", "check the path")
    if path.is_dir():
        raise UserError(f"{path} is a folder, a file is needed", "give the model file inside it")
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"{path} is empty", "copy or download the file again")
    if is_pickle(start):
        return PickleCheckpoint(path)
    return SafetensorsCheckpoint(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors header, without reading a tensor; empty for other kinds of files."""
    path = Path(path)
    with open(path, "rb") as file:
        if is_pickle(file.read(16)):
            return {}
    return SafetensorsCheckpoint(path).metadata


def is_pickle(start: bytes) -> bool:
    """Whether a file's first bytes are a torch pickle's (zip or plain)."""
    # A safetensors header may happen to be as long as a pickle's first byte says, so its brace decides.
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= _MAX_HEADER:
        return False
    return start.startswith((b"PK\x03\x04", b"\x80"))


def is_safetensors_name(path: str | Path) -> bool:
    """Whether the name ends in `.safetensors`, in any case."""
    return Path(path).suffix.lower() == ".safetensors"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """JSON header of a safetensors file and the offset at which its data starts."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise UserError(f"{path} is a Git LFS pointer, not the model itself", "fetch it with `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        first = file.read(1)
        if length > _MAX_HEADER or first != b"{":
            raise UserError(f"{path} is not a model file", "give a .safetensors or .ckpt file")
        if size < 8 + length:
            raise UserError(f"{path} is truncated ({size} bytes)", "copy or download the file again")
        raw = first + file.read(length - 1)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} has a damaged header", "copy or download the file again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged header", "copy or download the file again")
    return header, 8 + length


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype_word, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a damaged header", "copy or download the file again") from error
    if dtype_word not in DTYPES:
        raise UserError(f"{path}: tensor {name} has the number format {dtype_word}", "convert it to fp16, bf16 or fp32")
    info = TensorInfo(DTYPES[dtype_word], shape, data_start + begin)
    if end - begin != info.size:
        raise UserError(f"{path} has a damaged header", "copy or download the file again")
    return info


def _fill(file: Any, tensor: torch.Tensor, path: Path) -> None:
    """Read straight into the tensor's memory."""
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise UserError(f"{path} is truncated", "copy or download the file again")
        done += count


def load_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """A pickle's content, read without running anything in it.

    Args:
        allowed: classes besides torch's own list that it may hold.

    Raises:
        UserError: truncated, no torch pickle, or one that wants to run code.
    """
    stand_ins: dict[str, type] = {f"{one.__module__}.{one.__name__}": one for one in allowed}
    while True:
        try:
            content = _load_weights_only(path, stand_ins)
            break
        except Exception as error:
            wanted = _UNSUPPORTED.search(str(error))
            if wanted is None:
                raise UserError(
                    f"{path} cannot be read as a model ({_first_line(error)})",
                    "it may be truncated or of another kind; copy or download it again",
                ) from error
            name = wanted.group(1)
            if not name.startswith(_STAND_IN_ROOTS) or name in stand_ins:
                raise UserError(
                    f"{path} wants to run code ({name}) and was not opened", "use a .safetensors version of the model"
                ) from error
            module, _, attribute = name.rpartition(".")
            stand_ins[name] = type(attribute, (), {"__module__": module, "__setstate__": lambda self, state: None})
    return content


def _load_pickle(path: Path) -> Mapping[str, Any]:
    content = load_pickle(path)
    if isinstance(content, torch.nn.Module) or not isinstance(content, Mapping):
        raise UserError(f"{path} holds no model weights", "give a file with a dictionary of tensors")
    return content


def _load_weights_only(path: Path, stand_ins: Mapping[str, type]) -> Any:
    earlier = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(stand_ins.values()))
    try:
        if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with open(path, "rb") as file:  # by its name alone torch would take a .safetensors file for one
            return torch.load(file, map_location="cpu", weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(earlier)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
