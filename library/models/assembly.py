"""Modules filled from files: empty modules on the meta device, tensors assigned as they are read.

One pass over a file serves all parts of a model, so each tensor is read once, cast, moved and then owned by its
module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.checkpoint import Checkpoint
from library.models.key_maps import Entry

LISTED = 10


@dataclass
class Part:
    """A module to fill.

    Attributes:
        name: for messages: `U-Net`, `text encoder`, `VAE`.
        module: empty, on the meta device.
        entries: which file tensors hold which of its tensors.
        dtype: of its floating tensors.
        unexpected: tensors of the file that look like this part's and have no place.
    """

    name: str
    module: nn.Module
    entries: list[Entry]
    dtype: torch.dtype | None = None
    unexpected: list[str] = field(default_factory=list)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a module's state dict."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def fill(checkpoint: Checkpoint, parts: Sequence[Part], *, device: str | torch.device = "cpu") -> None:
    """Read the parts' tensors in one pass and hand them to their modules.

    Args:
        checkpoint: opened file.
        parts: empty modules with their entries.
        device: where every tensor goes.

    Raises:
        UserError: tensors are missing, have other shapes, have no place, or hold non-finite values.
    """
    _refuse_mismatch(checkpoint, parts)
    by_key = {entry.file_key: (part, entry) for part in parts for entry in part.entries}
    states: dict[int, dict[str, torch.Tensor]] = {id(part): {} for part in parts}
    sums: dict[str, torch.Tensor] = {}
    for name, tensor in _stream(checkpoint, parts, device):
        part, entry = by_key[name]
        if tensor.is_floating_point():
            sums[name] = tensor.sum(dtype=torch.float32)
        states[id(part)].update(entry.to_module(tensor))
    _refuse_non_finite(checkpoint, sums, by_key, states)
    for part in parts:
        part.module.load_state_dict(states.pop(id(part)), strict=True, assign=True)


def _stream(checkpoint: Checkpoint, parts: Iterable[Part], device: str | torch.device) -> Iterable[Any]:
    dtype_of = {entry.file_key: part.dtype for part in parts for entry in part.entries}
    for name, tensor in checkpoint.stream(dtype_of):
        dtype = dtype_of[name] if tensor.is_floating_point() else None
        yield name, tensor.to(device=device, dtype=dtype or tensor.dtype)


def _refuse_mismatch(checkpoint: Checkpoint, parts: Sequence[Part]) -> None:
    problems = []
    for part in parts:
        shapes = shapes_of(part.module)
        missing = [e.file_key for e in part.entries if e.file_key not in checkpoint.tensors]
        wrong = []
        for entry in part.entries:
            info = checkpoint.tensors.get(entry.file_key)
            if info is None:
                continue
            got = dict(entry.to_module(torch.empty(info.shape, device="meta")))
            wrong += [
                f"{entry.file_key} {tuple(tensor.shape)} for {shapes[key]}"
                for key, tensor in got.items()
                if tuple(tensor.shape) != shapes[key]
            ][:1]
        for what, keys in (("lacks", missing), ("has other shapes in", wrong), ("does not know", part.unexpected)):
            if keys:
                more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
                problems.append(f"the {part.name} {what} {', '.join(keys[:LISTED])}{more}")
    if problems:
        raise UserError(f"{checkpoint.path} does not fit: {'; '.join(problems)}", "give a complete checkpoint")


def _refuse_non_finite(
    checkpoint: Checkpoint,
    sums: Mapping[str, torch.Tensor],
    by_key: Mapping[str, tuple[Part, Entry]],
    states: Mapping[int, Mapping[str, torch.Tensor]],
) -> None:
    if not sums or bool(torch.stack(list(sums.values())).isfinite().all()):
        return
    bad = []
    for name, total in sums.items():
        part, entry = by_key[name]
        # A sum can overflow where every value is finite, so the values decide.
        tensors = [states[id(part)][key] for key in entry.module_keys]
        if not total.isfinite() and not all(bool(t.isfinite().all()) for t in tensors):
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise UserError(f"{checkpoint.path} holds non-finite values in {bad[0]}{more}", "use an intact copy of it")
