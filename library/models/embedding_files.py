"""Embedding files of textual inversion: every public layout read into one record, and written as it is read.

| what the file holds | kind |
|---|---|
| `emb_params`, `string_to_param` with one entry, one tensor of any name, or a bare tensor | plain: one text encoder |
| `clip_l` and `clip_g`, or `text_encoders_0` and `text_encoders_1` | sdxl: a table for each text encoder |
| the 16 layer names | xti: one table for each cross-attention of the SD 1.x/2.x U-Net |

Pickles are read with `weights_only` alone: nothing in them can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError
from library.models.checkpoint import is_pickle, load_pickle, open_checkpoint
from library.models.checkpoint_writer import save_tensors

PLAIN, SDXL, XTI = "plain", "sdxl", "xti"
PLAIN_KEY = "emb_params"
SDXL_KEYS = ("clip_l", "clip_g")
_SDXL_SYNONYMS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_TITLES = {PLAIN: "an embedding for one text encoder (SD 1.x or 2.x)", SDXL: "an SDXL embedding", XTI: "an XTI file"}
# Length of a vector -> the published models that have it.
_MODELS_BY_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the second text encoder of SDXL"}
# Cross-attentions of the SD 1.x/2.x U-Net in forward order, under the names that XTI files use.
XTI_LAYERS = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """The vectors of one word.

    Attributes:
        path: where they come from, for messages.
        kind: `plain`, `sdxl` or `xti`.
        tensors: (n, D) each; plain: `emb_params`; sdxl: `clip_l` and `clip_g`, one of which may be missing; xti: the
            16 layers in forward order.
    """

    path: Path
    kind: str
    tensors: dict[str, torch.Tensor]

    @property
    def count(self) -> int:
        """Vectors of the word."""
        return len(next(iter(self.tensors.values())))


def read_embedding(path: str | Path) -> StoredEmbedding:
    """Read an embedding file of any kind; its content, not its suffix, says which.

    Raises:
        UserError: missing, damaged, a pickle that wants to run code, or not an embedding.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"embedding file {path} does not exist", "check the path")
    kind, tensors = _sorted_out(_content(path), path)
    tensors = {name: _table(value, name, path) for name, value in tensors.items()}
    if len({len(table) for table in tensors.values()}) > 1:
        counts = ", ".join(f"{name} {len(table)}" for name, table in tensors.items())
        raise UserError(f"{path} has unequal numbers of vectors: {counts}", "use a file whose tables belong together")
    return StoredEmbedding(path, kind, tensors)


def tables_of(stored: StoredEmbedding, kind: str) -> list[torch.Tensor | None]:
    """The tables (n, D) of an embedding: one per text encoder (None where the file has none), or one per XTI layer.

    Raises:
        UserError: the file is of another kind.
    """
    _require_kind(stored, kind)
    names = {PLAIN: (PLAIN_KEY,), SDXL: SDXL_KEYS, XTI: XTI_LAYERS}[kind]
    return [stored.tensors.get(name) for name in names]


def tables_for_encoders(stored: StoredEmbedding, widths: Sequence[int]) -> list[torch.Tensor | None]:
    """A plain or SDXL embedding as one table (n, D) per text encoder; None where the file has none.

    Args:
        widths: length of a vector of each text encoder.

    Raises:
        UserError: the embedding is for another kind of model.
    """
    tables = tables_of(stored, PLAIN if len(widths) == 1 else SDXL)
    for table, width in zip(tables, widths, strict=True):
        if table is not None:
            require_width(table, width, stored.path)
    return tables


def tables_for_layers(stored: StoredEmbedding, width: int) -> list[torch.Tensor]:
    """An XTI file as one table (n, D) per layer, in the order of `XTI_LAYERS`.

    Raises:
        UserError: the file is of another kind, or for a text encoder of another width.
    """
    tables = [table for table in tables_of(stored, XTI) if table is not None]
    for table in tables:
        require_width(table, width, stored.path)
    return tables


def write_embedding(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tables (n, D) under their names: safetensors by suffix, else a torch pickle of the plain dict.

    Args:
        dtype: of the file; None keeps each table's own.
        metadata: texts for a safetensors file.
    """
    save_tensors(path, {name: table.detach() for name, table in tensors.items()}, metadata, dtype)


def _content(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(16)
    if is_pickle(start):
        return load_pickle(path, (torch.nn.ParameterDict, set))
    return open_checkpoint(path).read()


def _sorted_out(content: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a file's content and its tensors under our names."""
    if torch.is_tensor(content):
        return PLAIN, {PLAIN_KEY: content}
    if not isinstance(content, Mapping):
        raise _not_an_embedding(path, f"it holds a {type(content).__name__}")
    if "string_to_param" in content:
        content = content["string_to_param"]
        content = getattr(content, "_parameters", content)
    named = {_SDXL_SYNONYMS.get(name, name): value for name, value in content.items()}
    if any(key in named for key in SDXL_KEYS):
        return SDXL, {key: named[key] for key in SDXL_KEYS if key in named}
    if any(layer in named for layer in XTI_LAYERS):
        missing = [layer for layer in XTI_LAYERS if layer not in named]
        if missing:
            raise UserError(f"{path} is an XTI file without the layers {', '.join(missing)}", "use a complete file")
        return XTI, {layer: named[layer] for layer in XTI_LAYERS}
    if PLAIN_KEY in named:
        return PLAIN, {PLAIN_KEY: named[PLAIN_KEY]}
    if len(named) == 1:
        return PLAIN, {PLAIN_KEY: next(iter(named.values()))}
    raise _not_an_embedding(path, f"its keys are {', '.join(map(str, list(named)[:4])) or 'none'}")


def _not_an_embedding(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not an embedding file ({why})",
        "give a file with the vectors of one word: emb_params, clip_l and clip_g, or the XTI layers",
    )


def _table(value: Any, name: str, path: Path) -> torch.Tensor:
    """One entry of a file as (n, D); a single vector is a table of one row."""
    if not torch.is_tensor(value) or not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        what = f"{tuple(value.shape)} {value.dtype}" if torch.is_tensor(value) else type(value).__name__
        raise _not_an_embedding(path, f"{name} is {what}")
    table = value.detach().clone()
    if not torch.isfinite(table).all():
        raise UserError(f"{path} holds values that are not finite numbers", "use another file: this one is broken")
    return table[None] if table.ndim == 1 else table


def _require_kind(stored: StoredEmbedding, wanted: str) -> None:
    if stored.kind == wanted:
        return
    remedies = {
        PLAIN: "use an SDXL model, or an embedding made for SD 1.x or 2.x",
        SDXL: "use an SD 1.x or 2.x model, or an embedding made for SDXL",
        XTI: "give it with --textual_inversion_embeddings, or as --weights of train_textual_inversion.py",
    }
    remedy = remedies[wanted]
    if stored.kind == XTI:
        remedy = "give it with --XTI_embeddings, or --weights of train_textual_inversion_XTI.py, for SD 1.x or 2.x"
    raise UserError(f"{stored.path} is {_TITLES[stored.kind]}, {_TITLES[wanted]} is needed", remedy)


def require_width(table: torch.Tensor, width: int, path: str | Path) -> None:
    """Refuse vectors (n, D) for a text encoder of another width.

    Raises:
        UserError: they are; it names the models that have such vectors.
    """
    found = table.shape[1]
    if found != width:
        of = f" (those of {_MODELS_BY_WIDTH[found]})" if found in _MODELS_BY_WIDTH else ""
        raise UserError(
            f"{path} has vectors of {found} numbers{of}, the text encoder of this model has {width}",
            "use an embedding that was made for this kind of model",
        )
