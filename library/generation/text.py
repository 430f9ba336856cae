"""Prompts -> what the U-Net is conditioned on: long prompts in chunks, emphasis as weights on the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.generation.embeddings import Words
from library.messages import warn_once
from library.models.embedding_files import XTI_LAYERS
from library.models.family import Family, TextCondition
from library.models.text_encoders import apply_weights
from library.models.tokenizers import text_ids
from library.prompts import chunks
from library.prompts.chunks import PromptTokens, SpecialIds


class PromptReader:
    """Reads prompts with the tokenizers of a model; each text is read once.

    Args:
        tokenizers: one per text encoder.
        max_chunks: how many chunks of 75 tokens a prompt may fill; what is longer is cut, with a warning.
        words: of embedding files.
    """

    def __init__(self, tokenizers: Sequence[Any], max_chunks: int = 1, words: Words | None = None) -> None:
        self.tokenizers = list(tokenizers)
        self.max_chunks = max_chunks
        self.words = words or Words()
        self._layered = self.words.layered_ids
        self._read: dict[tuple[str, int], list[PromptTokens]] = {}

    def tokens(self, text: str, layer: int = 0) -> list[PromptTokens]:
        """The prompt's weighted ids, one entry per tokenizer; `layer` counts for XTI words alone."""
        if (text, layer) not in self._read:
            self._read[text, layer] = [self._tokens(text, tokenizer, layer) for tokenizer in self.tokenizers]
            if any(tokens.truncated for tokens in self._read[text, layer]):
                limit = chunks.CONTENT * self.max_chunks
                warn_once(f"prompt cut to {limit} tokens (--max_embeddings_multiples allows more): {text[:60]} ...")
        return self._read[text, layer]

    def encoder_ids(self, texts: Sequence[str], encoder: int, count: int, layer: int = 0) -> list[list[list[int]]]:
        """What a text encoder gets: for each text `count` chunks of 77 ids."""
        special = special_ids(self.tokenizers[encoder])
        rows = [chunks.padded_ids(self.tokens(text, layer)[encoder].ids, special, count) for text in texts]
        return [chunks.encoder_rows(row, special) for row in rows]

    def weights(self, texts: Sequence[str], encoder: int, count: int, layer: int = 0) -> list[list[float]]:
        """The weight of each of the 77 * `count` positions, for each text."""
        return [chunks.padded_weights(self.tokens(text, layer)[encoder].weights, count) for text in texts]

    def layers(self, texts: Sequence[str]) -> range:
        """The layers for which these texts differ: all of XTI where one has an XTI word, else the first alone."""
        found = self._layered and any(not self._layered.isdisjoint(self.tokens(text)[0].ids) for text in texts)
        return range(len(XTI_LAYERS)) if found else range(1)

    def chunk_count(self, texts: Sequence[str]) -> int:
        """Chunks that the longest of these prompts fills."""
        lengths = [len(tokens.ids) for text in texts for tokens in self.tokens(text)]
        return chunks.chunk_count(lengths, self.max_chunks)

    def _tokens(self, text: str, tokenizer: Any, layer: int) -> PromptTokens:
        def tokenize(piece: str) -> list[int]:
            return self.words.expand(text_ids(tokenizer, [piece])[0], layer)

        return chunks.prompt_tokens(text, tokenize, special_ids(tokenizer), self.max_chunks)


def special_ids(tokenizer: Any) -> SpecialIds:
    """Begin, end and padding id of a CLIP tokenizer."""
    return SpecialIds(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def encode_prompts(
    family: Family,
    text_encoders: Sequence[nn.Module],
    reader: PromptReader,
    texts: Sequence[str],
    *,
    clip_skip: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TextCondition:
    """Encode a batch's prompts, equal ones once.

    Args:
        texts: B prompts; all get the number of chunks n that the longest of them fills.
        clip_skip: which layer of the encoder counts, from the end; None for the last.

    Returns:
        hidden (B, 77 n, D) per encoder with the emphasis weights applied, and the pooled text of the family. Where a
        prompt has an XTI word, hidden is (16, B, 77 n, D): an entry for each cross-attention of the U-Net.
    """
    distinct = list(dict.fromkeys(texts))
    count = reader.chunk_count(distinct)
    encoders = range(len(reader.tokenizers))
    rows = [distinct.index(text) for text in texts]

    def encode(layer: int) -> TextCondition:
        ids = [torch.tensor(reader.encoder_ids(distinct, encoder, count, layer), device=device) for encoder in encoders]
        text = family.encode_text(
            list(text_encoders), ids, tokenizers=reader.tokenizers, clip_skip=clip_skip, dtype=dtype
        )
        weights = [reader.weights(distinct, encoder, count, layer) for encoder in encoders]
        hidden = [weigh(states, factors) for states, factors in zip(text.hidden, weights, strict=True)]
        return select(TextCondition(hidden, text.pooled), rows)

    encoded = [encode(layer) for layer in reader.layers(distinct)]
    if len(encoded) == 1:
        return encoded[0]
    return TextCondition([torch.stack(states) for states in zip(*(one.hidden for one in encoded), strict=True)])


def weigh(hidden: torch.Tensor, weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """Hidden states (B, L, D) with B lists of L emphasis weights applied; as they are where all weights are 1."""
    if all(weight == 1.0 for row in weights for weight in row):
        return hidden
    return apply_weights(hidden, torch.tensor(weights, device=hidden.device))


def select(text: TextCondition, rows: Sequence[int]) -> TextCondition:
    """The given rows of an encoding, in that order."""
    index = torch.tensor(rows, device=text.hidden[0].device)
    pooled = None if text.pooled is None else text.pooled[index]
    return TextCondition([states[index] for states in text.hidden], pooled)
