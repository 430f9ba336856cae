"""Text output cache files: the arrays of sd-scripts' `_te_outputs.npz`, and a key that tells whether they still hold.

`hidden_state1` (L, D1), `hidden_state2` (L, D2) and `pool2` (P), all float32. The key is one more array, `cache_key`,
a JSON text: the caption, the encoders and tokenizers, the precision. Other programs ignore it; their files have none
and are judged by their arrays alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from library.data.latents_file import ABSENT, BROKEN, FILE_BYTES, FLOAT_BYTES, UNREADABLE, VALID, read_header
from library.messages import UserError
from library.runtime.files import atomic_path

SUFFIX = "_te_outputs.npz"
FOREIGN = "of another program"
INCOMPLETE = "arrays missing"
CAPTION_CHANGED = "caption changed"
# Widths of SDXL's two hidden states and of its pooled text.
SDXL_WIDTHS = (768, 1280, 1280)
ARRAYS = ("hidden_state1", "hidden_state2", "pool2")


@dataclass(frozen=True, slots=True)
class CachedText:
    """Encoded text of one caption, or of several with one more dimension in front.

    Attributes:
        hidden1, hidden2: hidden states (L, D1), (L, D2) of the two text encoders.
        pooled: (P).
    """

    hidden1: torch.Tensor
    hidden2: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self.hidden1, self.hidden2, self.pooled

    def row(self, index: int) -> CachedText:
        """One caption of several, without a copy."""
        second = None if self.hidden2 is None else self.hidden2[index]
        return CachedText(self.hidden1[index], second, None if self.pooled is None else self.pooled[index])


@dataclass(frozen=True, slots=True)
class TextOrigin:
    """What every text output of a run is made with.

    Attributes:
        length: rows of the hidden states: 77, 152 or 227.
        widths: D1, D2 and P; empty: not compared.
        encoders: identity of the text encoders and tokenizers; empty: unknown, not compared.
        dtype: the encoders compute in it; empty: not compared.
    """

    length: int
    widths: tuple[int, ...] = ()
    encoders: str = ""
    dtype: str = ""

    @property
    def file_bytes(self) -> int:
        """About the size of a cache file; of SDXL's where the widths are not known."""
        first, second, pooled = self.widths or SDXL_WIDTHS
        return FLOAT_BYTES * (self.length * (first + second) + pooled) + FILE_BYTES

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the three arrays where the widths are known."""
        if not self.widths:
            return []
        return [(self.length, self.widths[0]), (self.length, self.widths[1]), (self.widths[2],)]


def key_text(caption: str, origin: TextOrigin) -> str:
    """The `cache_key` of this caption's outputs."""
    return json.dumps({"version": 1, "caption": caption, "encoders": origin.encoders, "dtype": origin.dtype})


def read_text(path: str | os.PathLike[str]) -> CachedText:
    """Read a cache file of this or of the original program; float32. The second and third array may be absent.

    Raises:
        UserError: broken, missing, or without hidden states.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name].astype(np.float32)) for name in ARRAYS if name in file.files}
    except UNREADABLE as error:
        raise UserError(
            f"cannot read text cache {path} ({error})", "delete the file and start again, it is made anew"
        ) from error
    if "hidden_state1" not in found:
        raise UserError(f"text cache {path} has no hidden_state1", "delete the file and start again, it is made anew")
    return CachedText(found["hidden_state1"], found.get("hidden_state2"), found.get("pool2"))


def write_text(path: str | os.PathLike[str], entry: CachedText, key: str | None = None) -> None:
    """Write a cache file as a whole or not at all.

    Args:
        path: the `.npz`.
        entry: its content; stored as float32.
        key: see `key_text`; None: no key.
    """
    arrays: dict[str, Any] = {
        name: tensor.float().cpu().numpy()
        for name, tensor in zip(ARRAYS, entry.tensors(), strict=True)
        if tensor is not None
    }
    if key is not None:
        arrays["cache_key"] = np.array(key)
    with atomic_path(path) as partial:
        np.savez(partial, **arrays)


def judge(path: str | os.PathLike[str], caption: str, origin: TextOrigin, *, skip_check: bool = False) -> str:
    """Whether a cache file holds this caption's outputs.

    Args:
        skip_check: any existing file will do.

    Returns:
        `VALID`; `FOREIGN`: taken, but nothing in it says from which caption it is; `ABSENT`; else the reason why it
        must be made anew.
    """
    if not os.path.exists(path):
        return ABSENT
    if skip_check:
        return VALID
    header = read_header(path)
    if header is None:
        return BROKEN
    if not set(ARRAYS) <= header.shapes.keys():
        return INCOMPLETE
    shapes = [header.shapes[name] for name in ARRAYS]
    if shapes[0][:1] != (origin.length,) or (origin.widths and shapes != origin.shapes()):
        return "other length or model"
    if header.key is None:
        return FOREIGN
    if header.key.get("version") != 1 or header.key.get("caption") != caption:
        return CAPTION_CHANGED
    for name, reason in (("encoders", "other text encoders"), ("dtype", "other precision")):
        ours, theirs = getattr(origin, name), header.key.get(name)
        if ours and theirs and ours != theirs:
            return reason
    return VALID
