"""Words of textual inversion: their tokens in a tokenizer and their rows in a text encoder's token table.

A word T with n vectors is the tokens T, T1, ..., T(n-1). They are matched exactly (case counts) and anywhere, also
inside words; the longest token wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.messages import UserError, warn_once
from library.models.embedding_files import XTI_LAYERS
from library.models.text_encoders import transformer_of
from library.models.tokenizers import clean_text, text_ids


def token_strings(word: str, count: int) -> list[str]:
    """T, T1, ..., T(count-1)."""
    return [f"{word}{index or ''}" for index in range(count)]


def layer_strings(word: str, count: int) -> list[list[str]]:
    """The tokens of each layer of XTI: T_L, T1_L, ... in the order of `XTI_LAYERS`."""
    return [[f"{token}_{layer}" for token in token_strings(word, count)] for layer in XTI_LAYERS]


def add_layer_tokens(tokenizers: Sequence[Any], word: str, count: int) -> list[list[int]]:
    """Add the tokens of a word for each layer of XTI; their ids, layer by layer.

    Raises:
        UserError: see `add_tokens`.
    """
    ids = add_tokens(tokenizers, [string for strings in layer_strings(word, count) for string in strings])
    return [ids[start : start + count] for start in range(0, len(ids), count)]


def add_tokens(tokenizers: Sequence[Any], strings: Sequence[str]) -> list[int]:
    """Add tokens to all tokenizers of a model.

    Returns:
        Their ids, the same in every tokenizer: consecutive, the last ones.

    Raises:
        UserError: a token is one of the tokenizer's own, or none that can be matched.
    """
    results = [_add_to_one(tokenizer, list(strings)) for tokenizer in tokenizers]
    if any(ids != results[0] for ids in results[1:]):
        raise UserError("the tokenizers of this model differ in their number of tokens", "use unchanged tokenizers")
    return results[0]


def _add_to_one(tokenizer: Any, strings: list[str]) -> list[int]:
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for string in strings:
        if not string or string != string.strip():
            raise UserError(f"the token {string!r} is empty or has blanks at its ends", "choose another word")
        if string in vocabulary:
            raise UserError(
                f"{string!r} is a token of the tokenizer already",
                "choose another word (embedding files: rename the file), one that no language has",
            )
        if clean_text(string) != string:
            raise UserError(f"the token {string!r} holds characters that tokenizers change", "use plain letters")
    _warn_of_hidden_word(strings[0], vocabulary)
    # Without normalizing, case counts, as in the published tokenizers that sd-scripts used.
    tokenizer.add_tokens([AddedToken(string, normalized=False) for string in strings])
    ids = tokenizer.convert_tokens_to_ids(strings)
    if ids != list(range(len(tokenizer) - len(strings), len(tokenizer))):
        raise UserError(f"the tokenizer did not take the token {strings[0]!r}", "choose another word")
    return ids


def _warn_of_hidden_word(string: str, vocabulary: dict[str, int]) -> None:
    if f"{string.lower()}</w>" in vocabulary:
        warn_once(f"{string!r} is an ordinary word of the tokenizer: its own meaning is hidden by the embedding")


def init_word_ids(tokenizer: Any, init_word: str, count: int) -> list[int]:
    """Ids whose rows the vectors of a word start from.

    Raises:
        UserError: the text has no tokens.
    """
    ids = text_ids(tokenizer, [init_word])[0]
    if not ids:
        raise UserError("--init_word is empty", "name one or more words to start from, or leave the option out")
    if len(ids) not in (1, count):
        what = "only the first are used" if len(ids) > count else "they are repeated"
        warn_once(f"--init_word {init_word!r} has {len(ids)} tokens for {count} vectors: {what}")
    return ids


def token_table(text_encoder: nn.Module) -> nn.Embedding:
    """The layer that holds a text encoder's token table (V, D)."""
    return transformer_of(text_encoder).embeddings.token_embedding


def widths_of(text_encoders: Sequence[nn.Module]) -> list[int]:
    """Length of a token's vector in each text encoder."""
    return [token_table(encoder).weight.shape[1] for encoder in text_encoders]


@torch.no_grad()
def grow_table(text_encoder: nn.Module, rows: int) -> None:
    """Give the token table `rows` rows, the new ones zero; the others and their number format stay."""
    table = token_table(text_encoder)
    old = table.weight
    if rows <= len(old):
        return
    weight = torch.cat([old, old.new_zeros(rows - len(old), old.shape[1])])
    table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    table.num_embeddings = rows
    # transformers compares them when a model is written to a folder
    text_encoder.config.vocab_size = rows


@torch.no_grad()
def set_rows(text_encoder: nn.Module, ids: Sequence[int], rows: torch.Tensor) -> None:
    """Write rows (n, D) into the token table."""
    weight = token_table(text_encoder).weight
    weight[torch.tensor(ids, device=weight.device)] = rows.to(weight)


@torch.no_grad()
def rows_of(text_encoder: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """A copy of rows (n, D) of the token table."""
    weight = token_table(text_encoder).weight
    return weight[torch.tensor(ids, device=weight.device)].clone()


@torch.no_grad()
def random_rows(text_encoder: nn.Module, count: int, known: int, generator: torch.Generator) -> torch.Tensor:
    """Rows (count, D) like those of ordinary words: normal with mean and deviation of the first `known` rows.

    Args:
        generator: on the CPU.
    """
    weight = token_table(text_encoder).weight
    ordinary = weight[:known].float()
    draw = torch.randn(count, weight.shape[1], generator=generator).to(ordinary)
    return draw * ordinary.std() + ordinary.mean()
