"""Strengths of blocks for the merge tools (`--lbws`): one list of 12, 17, 20 or 26 numbers a network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from library.messages import UserError

# Positions: BASE 0, IN00-IN11 1-12, MID 13, OUT00-OUT11 14-25. What a list of each length fills, in order.
_IN, _OUT, _MID = 1, 14, 13
POSITIONS = {
    12: (0, *(_IN + i for i in (4, 5, 7, 8)), _MID, *(_OUT + i for i in range(6))),
    17: (0, *(_IN + i for i in (1, 2, 4, 5, 7, 8)), _MID, *(_OUT + i for i in range(3, 12))),
    20: (0, *(_IN + i for i in range(9)), _MID, *(_OUT + i for i in range(9))),
    26: tuple(range(26)),
}
_LEVELS = re.compile(r"_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_STABILITY = re.compile(r"_(input_blocks|output_blocks)_(\d+)_")


def parse_block_weights(texts: Sequence[str] | None, count: int) -> list[dict[int, float]]:
    """Position -> strength for each of `count` networks; positions that a list does not have keep theirs.

    Raises:
        UserError: no JSON list of numbers, a wrong or differing length, or not one list a network.
    """
    if not texts:
        return [{} for _ in range(count)]
    if len(texts) != count:
        raise UserError(f"{len(texts)} --lbws for {count} --models", "give one list for each model")
    lists = [_numbers(text) for text in texts]
    lengths = {len(numbers) for numbers in lists}
    if len(lengths) > 1 or not lengths <= POSITIONS.keys():
        raise UserError(f"--lbws of {sorted(lengths)} numbers", "give lists of one length: 12, 17, 20 or 26")
    return [dict(zip(POSITIONS[len(numbers)], numbers, strict=True)) for numbers in lists]


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in json.loads(text)]
    except (TypeError, ValueError):
        raise UserError(f"--lbws {text} is no list of numbers", "write it like [1,0.5,...]") from None


def position_of(name: str) -> int | None:
    """Position of a module by its name in the file; None for one that no list reaches."""
    if "text_model_encoder_" in name:
        return 0
    if match := _LEVELS.search(name):
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            return _IN + 3 * (level + 1) if kind == "downsamplers" else _IN + 3 * level + index + 1
        return _OUT + 3 * level + (2 if kind == "upsamplers" else index)
    if match := _STABILITY.search(name):
        return (_IN if match[1] == "input_blocks" else _OUT) + int(match[2])
    if "_mid_block_" in name or "_middle_block_" in name:
        return _MID
    if "_time_embed_" in name or "_label_emb_" in name:
        return _IN
    return 23 if "_unet_out_" in name else None


def strength(weights: dict[int, float], name: str) -> float:
    """Factor for a module: 1 at positions that the list does not have."""
    position = position_of(name)
    return 1.0 if position is None else weights.get(position, 1.0)
