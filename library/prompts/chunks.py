"""Long prompts: weighted token ids, padded and cut into the chunks of 77 that a text encoder takes. No torch here.

A chunk holds 75 ids between BOS and EOS. Numbers: positions of BREAK count in steps of 77 although chunks hold 75,
so text after a BREAK does not start exactly at a chunk; pictures of many prompts depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from library.prompts.emphasis import BREAK, parse_attention

CHUNK = 77
CONTENT = CHUNK - 2

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of a tokenizer that mean begin, end and padding (SD 1.x pads with the end id, SD 2.x with 0)."""

    begin: int
    end: int
    pad: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """One prompt as ids with a weight each, without begin and end; `truncated`: it was longer than allowed."""

    ids: list[int]
    weights: list[float]
    truncated: bool = False


def prompt_tokens(text: str, tokenize: Tokenize, special: SpecialIds, max_chunks: int = 1) -> PromptTokens:
    """Read a prompt with emphasis marks into weighted ids, at most 75 * `max_chunks` of them.

    Args:
        tokenize: text -> ids without begin and end. Each piece of equal weight is tokenised alone; a piece `BREAK`
            fills up with padding.
    """
    limit = CONTENT * max_chunks
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in parse_attention(text, breaks=True):
        if piece.strip() == BREAK:
            new, weight = [special.pad] * (CHUNK - len(ids) % CHUNK), 1.0
        else:
            new = list(tokenize(piece))
        ids += new
        weights += [weight] * len(new)
        if len(ids) > limit:
            return PromptTokens(ids[:limit], weights[:limit], truncated=True)
    return PromptTokens(ids, weights)


def chunk_count(lengths: Sequence[int], max_chunks: int = 1) -> int:
    """Chunks that the longest of these id lists needs, 1..`max_chunks`."""
    return max(1, min(max_chunks, (max(lengths, default=0) - 1) // CONTENT + 1))


def padded_ids(ids: Sequence[int], special: SpecialIds, chunks: int) -> list[int]:
    """Begin, ids, end, padding: 75 * `chunks` + 2 ids."""
    row = [special.begin, *ids, special.end]
    return row + [special.pad] * (CONTENT * chunks + 2 - len(row))


def padded_weights(weights: Sequence[float], chunks: int) -> list[float]:
    """A weight for each of the 77 * `chunks` encoder positions: begin, end and padding count 1."""
    row: list[float] = []
    for start in range(0, CONTENT * chunks, CONTENT):
        part = list(weights[start : start + CONTENT])
        row += [1.0, *part, *[1.0] * (CONTENT - len(part)), 1.0]
    return row


def encoder_rows(row: Sequence[int], special: SpecialIds) -> list[list[int]]:
    """A padded row -> what the encoder gets: one list of 77 ids a chunk, each with its own begin and end."""
    count = (len(row) - 2) // CONTENT
    if count == 1:
        return [list(row)]
    chunks = []
    for start in range(0, CONTENT * count, CONTENT):
        chunk = list(row[start : start + CHUNK])
        chunk[0] = special.begin
        if chunk[-1] != special.pad or special.pad == special.end:
            chunk[-1] = special.end
        if chunk[1] == special.pad:
            chunk[1] = special.end
        chunks.append(chunk)
    return chunks
