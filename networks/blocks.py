"""Ranks, alphas and learning-rate weights by U-Net block, as `--network_args` gives them (networks.md 2.3 - 2.5, 13.2).

SD 1.x/2.x has 25 blocks: down 0..11, mid, up 0..11. SDXL has 23: time and label embedding, input blocks 0..8,
middle block 0..2, output blocks 0..8, output layers; the first and the last hold no adapter. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.messages import UserError, log

RE_UPDOWN = re.compile(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_")
RE_SDXL = re.compile(r"(?:^|_unet_)(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)_(\d+)")

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


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family counts the blocks of its U-Net.

    Attributes:
        family: name for messages.
        side: blocks on the way down, and on the way up.
        mid: blocks in the middle.
        edges: blocks without adapters before the first and after the last.
    """

    family: str
    side: int
    mid: int
    edges: int

    @property
    def total(self) -> int:
        return 2 * (self.side + self.edges) + self.mid

    @property
    def form(self) -> str:
        sides = f"{self.side} down, {self.mid} mid, {self.side} up"
        return f"{self.edges} for the embeddings, {sides}, {self.edges} for the output" if self.edges else sides


SD = Layout("SD 1.x/2.x", side=12, mid=1, edges=0)
SDXL = Layout("SDXL", side=9, mid=3, edges=1)
NUM_OF_BLOCKS = SD.side
_SDXL_START = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}


def layout_of(unet_names: Sequence[str]) -> Layout:
    """The layout of a U-Net by the names of its modules (with underscores): Stability's names are SDXL's."""
    return SDXL if any(name.startswith("input_blocks_") for name in unet_names) else SD


def get_block_index(lora_name: str, is_sdxl: bool = False) -> int:
    """Block of a module by its name, -1 where it has none: SD down 1..11, mid 12, up 13..24; SDXL 0..22."""
    if is_sdxl:
        match = RE_SDXL.search(lora_name)
        if match is None:
            return -1
        numbered = match[1] in ("input_blocks", "middle_block", "output_blocks")
        return _SDXL_START[match[1]] + (int(match[2]) if numbered else 0)
    match = RE_UPDOWN.search(lora_name)
    if match:
        side, block, kind, position = match[1], int(match[2]), match[3], int(match[4])
        index = 3 * block + (position if kind in ("resnets", "attentions") else 2)
        return 1 + index if side == "down" else SD.side + 1 + index
    return SD.side if "mid_block_" in lora_name else -1


# Learning-rate weights


def weights_from_arguments(
    layout: Layout, arguments: Mapping[str, Any]
) -> tuple[Weights | None, Weights | None, Weights | None]:
    """Weights of the down, mid and up blocks from network arguments, each None when not given.

    Raises:
        BlockWeightError: neither numbers nor a known preset, or a list of the other family's length.
    """
    threshold = number("block_lr_zero_threshold", arguments.get("block_lr_zero_threshold", 0.0))
    down, mid, up = (arguments.get(key) for key in ("down_lr_weight", "mid_lr_weight", "up_lr_weight"))
    return side_weights(layout, down, mid, up, threshold)


def side_weights(
    layout: Layout, down: Any, mid: Any, up: Any, threshold: float
) -> tuple[Weights | None, Weights | None, Weights | None]:
    """Weights of the down, mid and up blocks; what is not given stays None.

    Args:
        down, up: a list, a comma-separated text, or a preset `NAME` or `NAME+BASE`.
        mid: a number, or a list of them.
        threshold: weights that are not greater than this become 0.
    """
    lists = (
        _weights("down_lr_weight", down, layout.side, layout),
        _weights("mid_lr_weight", mid, layout.mid, layout),
        _weights("up_lr_weight", up, layout.side, layout),
    )
    cut = [None if one is None else [w if w > threshold else 0 for w in one] for one in lists]
    return cut[0], cut[1], cut[2]


def all_weights(
    layout: Layout, down: Sequence[float] | None, mid: Sequence[float] | None, up: Sequence[float] | None
) -> Weights | None:
    """The weights of every block, 1 where nothing is given; None if nothing is given at all."""
    if down is None and mid is None and up is None:
        return None
    parts = [(down, layout.side), (mid, layout.mid), (up, layout.side)]
    edge = [1.0] * layout.edges
    return [*edge, *(w for part, count in parts for w in (part if part is not None else [1.0] * count)), *edge]


def _weights(option: str, given: Any, count: int, layout: Layout) -> Weights | None:
    if given is None:
        return None
    if isinstance(given, str):
        if "," in given:
            weights = [number(option, item) if item.strip() else 0.0 for item in given.split(",")]
        else:
            weights = _preset(option, given, count)
    else:
        weights = list(given) if isinstance(given, Sequence) else [number(option, given)]
    if layout is SDXL and count == SDXL.side and len(weights) == SD.side:
        raise BlockWeightError(
            f"{option} has {SD.side} values, as for {SD.family}; {SDXL.family} has {count} blocks there",
            f"give {count} values",
        )
    if len(weights) > count:
        log.warning("%s: only the first %d of %d weights are used", option, count, len(weights))
    elif len(weights) < count:
        log.warning("%s: %d weights given, the rest of the %d is 1", option, len(weights), count)
    return (weights + [1.0] * count)[:count]


def _preset(option: str, text: str, count: int) -> Weights:
    name, _, base = text.partition("+")
    if name.strip() in PRESETS and option != "mid_lr_weight":
        curve, offset = PRESETS[name.strip()], number(option, base) if base else 0.0
        return [curve(i / (count - 1)) + offset for i in range(count)]
    try:
        return [float(text)]
    except ValueError:
        presets = "" if option == "mid_lr_weight" else f" or one of {', '.join(PRESETS)} (also as NAME+BASE)"
        raise BlockWeightError(
            f"{option}={text} is no block weight", f"give {count} comma-separated numbers{presets}"
        ) from None


# Ranks and alphas


@dataclass(slots=True)
class BlockRanks:
    """Rank and alpha of every block, for linear layers and 1x1 convolutions and for other convolutions."""

    dims: list[int]
    alphas: list[float]
    conv_dims: list[int] | None
    conv_alphas: list[float] | None

    def remove_zero_blocks(self, weights: Sequence[float] | None) -> None:
        """Set the rank of every block whose learning-rate weight is 0 to 0: no module is made there."""
        for index, weight in enumerate(weights or ()):
            if weight == 0:
                self.dims[index] = 0
                if self.conv_dims is not None:
                    self.conv_dims[index] = 0


def block_ranks(
    layout: Layout,
    block_dims: str | None,
    block_alphas: str | None,
    network_dim: int,
    network_alpha: float,
    conv_block_dims: str | None,
    conv_block_alphas: str | None,
    conv_dim: int | None,
    conv_alpha: float | None,
) -> BlockRanks:
    """Ranks and alphas by block from comma-separated texts, with the network's own where a text is missing.

    Raises:
        BlockWeightError: a text with another number of values than the family has blocks.
    """

    def values(option: str, text: str | None, kind: type, default: Any) -> list:
        return [default] * layout.total if text is None else _list(layout, option, text, kind)

    default_conv_alpha = 1.0 if conv_alpha is None else conv_alpha
    dims = values("block_dims", block_dims, int, network_dim)
    alphas = values("block_alphas", block_alphas, float, network_alpha)
    if conv_block_dims is not None:
        conv_dims = values("conv_block_dims", conv_block_dims, int, None)
        conv_alphas = values("conv_block_alphas", conv_block_alphas, float, default_conv_alpha)
        return BlockRanks(dims, alphas, conv_dims, conv_alphas)
    if conv_dim is not None:
        return BlockRanks(dims, alphas, [conv_dim] * layout.total, [default_conv_alpha] * layout.total)
    return BlockRanks(dims, alphas, None, None)


def number(option: str, value: Any) -> float:
    """A number from a text.

    Raises:
        BlockWeightError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BlockWeightError(f"{option}: {value!r} is not a number", "give numbers") from None


def _list(layout: Layout, option: str, text: str, kind: type) -> list:
    items = text.split(",")
    if len(items) != layout.total:
        other = SDXL if layout is SD else SD
        family = f", as for {other.family}" if len(items) == other.total else ""
        raise BlockWeightError(
            f"{option} has {len(items)} comma-separated values{family}",
            f"give {layout.total} for {layout.family} ({layout.form})",
        )
    try:
        return [kind(item) for item in items]
    except ValueError:
        raise BlockWeightError(f"{option}={text} holds something that is not a number", "give numbers") from None
