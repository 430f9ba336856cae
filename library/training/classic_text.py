"""Weighted captions as other programs encode them; nothing inside uses these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from library.models.text_encoders import apply_weights, encode_rows, join_chunks, weighted_rows
from library.prompts.emphasis import parse_attention

CHUNK = 77


def parse_prompt_attention(text: str) -> list[list[Any]]:
    """Text with emphasis marks -> [text, weight] pieces."""
    return [[piece, weight] for piece, weight in parse_attention(text)]


def get_prompts_with_weights(
    tokenizer: Any, prompt: Sequence[str], max_length: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and weights of prompts, without begin and end, at most `max_length` of them."""
    tokens, weights = [], []
    for text in prompt:
        ids: list[int] = []
        factors: list[float] = []
        for piece, weight in parse_attention(text):
            new = tokenizer(piece).input_ids[1:-1]
            ids += new
            factors += [weight] * len(new)
            if len(ids) > max_length:
                break
        tokens.append(ids[:max_length])
        weights.append(factors[:max_length])
    return tokens, weights


def pad_tokens_and_weights(
    tokens: list[list[int]],
    weights: list[list[float]],
    max_length: int,
    bos: int,
    eos: int,
    no_boseos_middle: bool = True,
    chunk_length: int = CHUNK,
) -> tuple[list[list[int]], list[list[float]]]:
    """Rows of `max_length` ids with begin and end, and a weight for each position of the encoded text."""
    inner = chunk_length - 2
    chunks = (max_length - 2) // inner
    padded = [[bos, *row, *[eos] * (max_length - 1 - len(row))] for row in tokens]
    scales = []
    for row in weights:
        if no_boseos_middle:
            scales.append([1.0, *row, *[1.0] * (max_length - 1 - len(row))])
            continue
        parts = [row[start : start + inner] for start in range(0, inner * chunks, inner)]
        scales.append([w for part in parts for w in [1.0, *part, *[1.0] * (chunk_length - 1 - len(part))]])
    return padded, scales


def get_unweighted_text_embeddings(
    tokenizer: Any,
    text_encoder: Any,
    text_input: torch.Tensor,
    chunk_length: int,
    clip_skip: int | None,
    eos: int,
    pad: int,
    no_boseos_middle: bool = True,
) -> torch.Tensor:
    """Padded rows (B, 75 n + 2) -> hidden states (B, 77 n, D), or (B, 75 n + 2, D) without inner begin and end."""
    inner = chunk_length - 2
    chunks = (text_input.shape[1] - 2) // inner
    if chunks <= 1:
        return encode_rows(text_encoder, text_input, clip_skip)
    parts = text_input.unfold(1, chunk_length, inner).clone()
    parts[:, :, 0] = text_input[:, :1]
    if pad == eos:
        parts[:, :, -1] = text_input[:, -1:]
    else:
        last = parts[:, :, -1]
        parts[:, :, -1] = torch.where((last != eos) & (last != pad), eos, last)
        parts[:, :, 1] = torch.where(parts[:, :, 1] == pad, eos, parts[:, :, 1])
    hidden = encode_rows(text_encoder, parts.reshape(-1, chunk_length), clip_skip)
    if no_boseos_middle:
        return join_chunks(hidden, chunks)
    return hidden.reshape(text_input.shape[0], -1, hidden.shape[-1])


def get_weighted_text_embeddings(
    tokenizer: Any,
    text_encoder: Any,
    prompt: str | Sequence[str],
    device: Any,
    max_embeddings_multiples: int = 3,
    no_boseos_middle: bool = False,
    clip_skip: int | None = None,
) -> torch.Tensor:
    """Encoded prompts with emphasis, each brought back to its mean before weighting.

    Args:
        max_embeddings_multiples: chunks of 75 tokens at most.
        no_boseos_middle: leave the inner begin and end states out.

    Returns:
        (B, 77 n, D), or (B, 75 n + 2, D) without the inner ones.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    tokens, weights = get_prompts_with_weights(tokenizer, texts, 75 * max_embeddings_multiples)
    ids, scale = weighted_rows(
        tokens,
        weights,
        max_chunks=max_embeddings_multiples,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    chunks = ids.shape[1]
    hidden = encode_rows(text_encoder, ids.reshape(-1, CHUNK).to(device), clip_skip)
    if no_boseos_middle:
        hidden, scale = join_chunks(hidden, chunks), join_chunks(scale.reshape(-1, CHUNK, 1), chunks)[..., 0]
    return apply_weights(hidden.reshape(len(texts), -1, hidden.shape[-1]), scale)
