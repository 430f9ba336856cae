"""Ranks, alphas and learning-rate weights by U-Net block, as `--network_args` gives them (SD 1.x/2.x: 25 blocks).

Order of the 25: down 0..11, mid, up 0..11 (networks.md 2.3 - 2.5). No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.messages import UserError, log

NUM_OF_BLOCKS = 12
TOTAL_BLOCKS = 2 * NUM_OF_BLOCKS + 1
MID_INDEX = NUM_OF_BLOCKS

RE_UPDOWN = re.compile(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_")

Weights = list[float]

PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda t: math.sin(math.pi * 0.5 * t),
    "cosine": lambda t: math.sin(math.pi * 0.5 * (1 - t)),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


class BlockWeightError(UserError, ValueError):
    """A block weight that is neither a list nor a preset."""


def get_block_index(lora_name: str) -> int:
    """Block of a module by its name: down 1..11, mid 12, up 13..24; -1 for anything else."""
    match = RE_UPDOWN.search(lora_name)
    if match:
        side, block, kind, position = match[1], int(match[2]), match[3], int(match[4])
        index = 3 * block + (position if kind in ("resnets", "attentions") else 2)
        return 1 + index if side == "down" else MID_INDEX + 1 + index
    return MID_INDEX if "mid_block_" in lora_name else -1


def parse_block_lr_kwargs(nw_kwargs: Mapping[str, Any]) -> tuple[Weights | None, float | None, Weights | None]:
    """Block learning-rate weights from network arguments: (down, mid, up), each None when not given."""
    down = nw_kwargs.get("down_lr_weight")
    mid = nw_kwargs.get("mid_lr_weight")
    up = nw_kwargs.get("up_lr_weight")
    threshold = _number("block_lr_zero_threshold", nw_kwargs.get("block_lr_zero_threshold", 0.0))
    return get_block_lr_weight(down, None if mid is None else _number("mid_lr_weight", mid), up, threshold)


def get_block_lr_weight(
    down_lr_weight: str | Sequence[float] | None,
    mid_lr_weight: float | None,
    up_lr_weight: str | Sequence[float] | None,
    zero_threshold: float,
) -> tuple[Weights | None, float | None, Weights | None]:
    """Weights of the 12 down blocks, the mid block and the 12 up blocks; what is not given stays None.

    Args:
        down_lr_weight, up_lr_weight: a list, a comma-separated text, or a preset `NAME` or `NAME+BASE`.
        zero_threshold: weights that are not greater than this become 0.

    Raises:
        BlockWeightError: neither numbers nor a known preset.
    """

    def cut(value: float) -> float:
        return value if value > zero_threshold else 0

    down = _weights("down_lr_weight", down_lr_weight)
    up = _weights("up_lr_weight", up_lr_weight)
    return (
        None if down is None else [cut(value) for value in down],
        None if mid_lr_weight is None else cut(mid_lr_weight),
        None if up is None else [cut(value) for value in up],
    )


def get_block_dims_and_alphas(
    block_dims: str | None,
    block_alphas: str | None,
    network_dim: int,
    network_alpha: float,
    conv_block_dims: str | None,
    conv_block_alphas: str | None,
    conv_dim: int | None,
    conv_alpha: float | None,
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """Rank and alpha of each of the 25 blocks, for linear layers and for convolutions (None: no convolutions)."""
    dims = _list("block_dims", block_dims, int) if block_dims is not None else [network_dim] * TOTAL_BLOCKS
    alphas = _list("block_alphas", block_alphas, float) if block_alphas is not None else [network_alpha] * TOTAL_BLOCKS

    if conv_block_dims is not None:
        conv_dims = _list("conv_block_dims", conv_block_dims, int)
        if conv_block_alphas is not None:
            conv_alphas = _list("conv_block_alphas", conv_block_alphas, float)
        else:
            conv_alphas = [1.0 if conv_alpha is None else conv_alpha] * TOTAL_BLOCKS
        return dims, alphas, conv_dims, conv_alphas
    if conv_dim is not None:
        return dims, alphas, [conv_dim] * TOTAL_BLOCKS, [1.0 if conv_alpha is None else conv_alpha] * TOTAL_BLOCKS
    return dims, alphas, None, None


def remove_block_dims_and_alphas(
    block_dims: list[int],
    block_alphas: list[float],
    conv_block_dims: list[int] | None,
    conv_block_alphas: list[float] | None,
    down_lr_weight: Sequence[float] | None,
    mid_lr_weight: float | None,
    up_lr_weight: Sequence[float] | None,
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """Set the rank of every block whose learning-rate weight is 0 to 0: no module is made there (lists in place)."""
    for index in range(TOTAL_BLOCKS):
        if block_lr_weight(index, down_lr_weight, mid_lr_weight, up_lr_weight) == 0:
            block_dims[index] = 0
            if conv_block_dims is not None:
                conv_block_dims[index] = 0
    return block_dims, block_alphas, conv_block_dims, conv_block_alphas


def block_lr_weight(index: int, down: Sequence[float] | None, mid: float | None, up: Sequence[float] | None) -> float:
    """Learning-rate weight of block `index`; 1 where nothing is given or the index is -1."""
    if index < 0:
        return 1.0
    if index < MID_INDEX:
        return 1.0 if down is None else down[index]
    if index == MID_INDEX:
        return 1.0 if mid is None else mid
    return 1.0 if up is None else up[index - MID_INDEX - 1]


def _weights(option: str, given: str | Sequence[float] | None) -> Weights | None:
    if given is None:
        return None
    if not isinstance(given, str):
        weights = list(given)
    elif "," in given:
        weights = [_number(option, item) if item.strip() else 0.0 for item in given.split(",")]
    else:
        weights = _preset(option, given)
    if len(weights) > NUM_OF_BLOCKS:
        log.warning("%s: only the first %d of %d weights are used", option, NUM_OF_BLOCKS, len(weights))
    elif len(weights) < NUM_OF_BLOCKS:
        log.warning("%s: %d weights given, the rest of the %d is 1", option, len(weights), NUM_OF_BLOCKS)
    return (weights + [1.0] * NUM_OF_BLOCKS)[:NUM_OF_BLOCKS]


def _preset(option: str, text: str) -> Weights:
    name, _, base = text.partition("+")
    if name.strip() in PRESETS:
        curve, offset = PRESETS[name.strip()], _number(option, base) if base else 0.0
        return [curve(i / (NUM_OF_BLOCKS - 1)) + offset for i in range(NUM_OF_BLOCKS)]
    try:
        return [float(text)]
    except ValueError:
        remedy = f"give {NUM_OF_BLOCKS} comma-separated numbers or one of {', '.join(PRESETS)} (also as NAME+BASE)"
        raise BlockWeightError(f"{option}={text} is no block weight", remedy) from None


def _number(option: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BlockWeightError(f"{option}: {value!r} is not a number", "give numbers") from None


def _list(option: str, text: str, kind: type) -> list:
    items = text.split(",")
    if len(items) != TOTAL_BLOCKS:
        remedy = f"give {TOTAL_BLOCKS} (12 down, 1 mid, 12 up)"
        raise BlockWeightError(f"{option} has {len(items)} comma-separated values", remedy)
    try:
        return [kind(item) for item in items]
    except ValueError:
        raise BlockWeightError(f"{option}={text} holds something that is not a number", "give numbers") from None
