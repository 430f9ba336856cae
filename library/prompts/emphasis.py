"""Emphasis marks in prompts and captions: `(more)`, `((even more))`, `[less]`, `(this much:1.3)`, `\\(literal\\)`."""

from __future__ import annotations

import re

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
BREAK = "BREAK"

_TOKEN = re.compile(
    r"""
      \\(?P<escaped>[()\[\]\\])
    | (?P<lone>\\)
    | (?P<open>[(\[])
    | :(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)


def parse_attention(text: str, *, breaks: bool = False) -> list[tuple[str, float]]:
    """Text with emphasis marks -> pieces with their weights, in order; neighbours of equal weight are joined.

    Args:
        text: the prompt or caption. A bracket without its partner is literal (closing) or counts to the end
            (opening); a weight that is not a number is literal text.
        breaks: every `BREAK` becomes a piece of its own (picture prompts); captions know no BREAK.

    Returns:
        At least one pair; `[("", 1.0)]` for text without content.
    """
    if breaks:
        text = text.replace(BREAK, f"\\{BREAK}\\")
    pieces = _weigh(text)
    return _join_equal(pieces, breaks) or [("", 1.0)]


def _weigh(text: str) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = open_at[bracket].pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            open_at[token["open"]].append(len(pieces))
        elif kind == "weight" and open_at["("]:
            close("(", float(token["weight"]))
        elif token["close"] == ")" and open_at["("]:
            close("(", ROUND_FACTOR)
        elif token["close"] == "]" and open_at["["]:
            close("[", SQUARE_FACTOR)
        elif kind == "escaped":
            pieces.append((token["escaped"], 1.0))
        elif kind == "lone":
            pieces.append(("", 1.0))
        else:
            pieces.append((token[0], 1.0))
    for bracket, factor in (("(", ROUND_FACTOR), ("[", SQUARE_FACTOR)):
        while open_at[bracket]:
            close(bracket, factor)
    return pieces


def _join_equal(pieces: list[tuple[str, float]], breaks: bool) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            last = joined[-1][0]
            if not (breaks and BREAK in (last.strip(), text.strip())):
                joined[-1] = (last + text, weight)
                continue
        joined.append((text, weight))
    return joined
