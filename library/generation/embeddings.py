"""Words of embedding files in prompts: their vectors go into the text encoders, their tokens into the tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.messages import UserError, log
from library.models.embedding_files import (
    SDXL_KEYS,
    StoredEmbedding,
    read_embedding,
    tables_for_encoders,
    tables_for_layers,
)
from library.models.embeddings import add_layer_tokens, add_tokens, grow_table, set_rows, token_strings, widths_of
from library.models.family import LoadedModel


@dataclass(frozen=True, slots=True)
class Words:
    """How prompts read words with several vectors; ids are the same in every tokenizer of a model.

    Attributes:
        vectors: id of a word -> ids of all its vectors.
        layers: id of an XTI word -> ids of its vectors for each cross-attention of the U-Net.
    """

    vectors: Mapping[int, Sequence[int]] = field(default_factory=dict)
    layers: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)

    def expand(self, ids: Sequence[int], layer: int = 0) -> list[int]:
        """Token ids with every word as the ids of its vectors, XTI words as those of one layer."""
        expanded: list[int] = []
        for one in ids:
            expanded += self.layers[one][layer] if one in self.layers else self.vectors.get(one, (one,))
        return expanded

    @property
    def layered_ids(self) -> frozenset[int]:
        """Ids that `expand` gives for XTI words."""
        return frozenset(one for layers in self.layers.values() for ids in layers for one in ids)


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """The embedding files of a command line, read and not yet in a model; the file name is the word."""

    plain: tuple[StoredEmbedding, ...] = ()
    xti: tuple[StoredEmbedding, ...] = ()

    @property
    def names(self) -> list[str]:
        return [stored.path.name for stored in (*self.plain, *self.xti)]


def read_embeddings(plain: Sequence[str] | None, xti: Sequence[str] | None = None) -> EmbeddingFiles:
    """Read the files of `--textual_inversion_embeddings` and `--XTI_embeddings`.

    Raises:
        UserError: a file that is missing, damaged or no embedding.
    """
    return EmbeddingFiles(*(tuple(read_embedding(path) for path in paths or ()) for paths in (plain, xti)))


def add_embeddings(model: LoadedModel, files: EmbeddingFiles) -> Words:
    """Put the files' words into a model's tokenizers and their vectors into its text encoders.

    Raises:
        UserError: a file for another kind of model, or a word that the tokenizer has already.
    """
    widths = widths_of(model.text_encoders)
    vectors: dict[int, list[int]] = {}
    layers: dict[int, list[list[int]]] = {}
    rows: list[tuple[int, list[int], torch.Tensor]] = []
    for stored in files.plain:
        tables = _complete(stored, tables_for_encoders(stored, widths))
        ids = _added(stored, add_tokens, model.tokenizers, token_strings(stored.path.stem, stored.count))
        vectors[ids[0]] = ids
        rows += [(encoder, ids, table) for encoder, table in enumerate(tables)]
    for stored in files.xti:
        by_layer = tables_for_layers(stored, widths[0])
        ids = _added(stored, add_tokens, model.tokenizers, token_strings(stored.path.stem, stored.count))
        layers[ids[0]] = _added(stored, add_layer_tokens, model.tokenizers, stored.path.stem, stored.count)
        rows += [(0, layer, table) for layer, table in zip(layers[ids[0]], by_layer, strict=True)]
        # A prompt may name a single vector (word1), which has no layer: it is the middle of all.
        rows.append((0, ids, torch.stack(by_layer).mean(dim=0)))
    for encoder in model.text_encoders if rows else ():
        grow_table(encoder, max(ids[-1] for _, ids, _ in rows) + 1)
    for index, ids, table in rows:
        set_rows(model.text_encoders[index], ids, table)
    for stored in (*files.plain, *files.xti):
        log.info(f"{stored.path}: word {stored.path.stem!r}, vectors: {stored.count}")
    return Words(vectors, layers)


def _complete(stored: StoredEmbedding, tables: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    missing = [name for name, table in zip(SDXL_KEYS, tables, strict=False) if table is None]
    if missing:
        raise UserError(f"{stored.path} has no {missing[0]}", "drawing needs vectors for both text encoders of SDXL")
    return [table for table in tables if table is not None]


def _added(stored: StoredEmbedding, add: Callable[..., Any], *arguments: Any) -> Any:
    """What a function that adds tokens gives; a refusal names the file."""
    try:
        return add(*arguments)
    except UserError as error:
        remedy = "rename the file: its name is the word in prompts"
        raise UserError(f"{stored.path}: {error.problem}", remedy) from error
