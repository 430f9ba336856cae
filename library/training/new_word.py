"""The word that a run teaches: its tokens, and how captions and prompts name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.generation.embeddings import Words
from library.models.embeddings import add_layer_tokens, add_tokens, token_strings


@dataclass(frozen=True, slots=True)
class NewWord:
    """A word with n vectors; the ids are the same in every tokenizer.

    Attributes:
        text: as captions name it.
        tokens: T, T1, ..., T(n-1).
        ids: of these tokens.
        layer_ids: XTI: for each cross-attention the ids of the tokens that stand for them there, else empty.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    layer_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def trained_ids(self) -> list[int]:
        """Ids whose vectors are learned: consecutive, to the end of the table."""
        return [one for layer in self.layer_ids or (self.ids,) for one in layer]

    @property
    def prompt_replacement(self) -> tuple[str, str] | None:
        """(the word, all its tokens) where these differ."""
        return (self.text, " ".join(self.tokens)) if len(self.tokens) > 1 else None

    @property
    def words(self) -> Words:
        """How prompts read the word."""
        first, ids = self.ids[0], list(self.ids)
        return Words(layers={first: self.layer_ids}) if self.layer_ids else Words(vectors={first: ids})

    def for_layers(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape -> the same for each layer of XTI, on a new first axis."""
        per_layer = []
        for layer in self.layer_ids:
            ids = input_ids
            for plain, own in zip(self.ids, layer, strict=True):
                ids = torch.where(input_ids == plain, own, ids)
            per_layer.append(ids)
        return torch.stack(per_layer)


def add_word(tokenizers: Sequence[Any], text: str, count: int, *, layered: bool = False) -> NewWord:
    """Add the tokens of a new word to the tokenizers of a model.

    Args:
        count: vectors of the word.
        layered: it has its own vectors for each cross-attention (XTI).

    Raises:
        UserError: the tokenizer has one of the tokens already.
    """
    tokens = token_strings(text, count)
    ids = add_tokens(tokenizers, tokens)
    layers = add_layer_tokens(tokenizers, text, count) if layered else []
    return NewWord(text, tuple(tokens), tuple(ids), tuple(tuple(layer) for layer in layers))
