"""The block functions as third parties call them: in the form of sd-scripts 0.7.0, or with `is_sdxl` first as since
v0.9.0 (a bool as first argument tells them apart). Nothing inside uses these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from networks import blocks


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, blocks.Layout, tuple[Any, ...]]:
    """(whether the later form is called, the layout, the other positional arguments)."""
    if "is_sdxl" in kwargs:
        return True, blocks.SDXL if kwargs.pop("is_sdxl") else blocks.SD, args
    if args and isinstance(args[0], bool):
        return True, blocks.SDXL if args[0] else blocks.SD, args[1:]
    return False, blocks.SD, args


def _result(is_later: bool, layout: blocks.Layout, sides: tuple[Any, Any, Any]) -> Any:
    down, mid, up = sides
    return blocks.all_weights(layout, down, mid, up) if is_later else (down, None if mid is None else mid[0], up)


def parse_block_lr_kwargs(*args: Any, **kwargs: Any) -> Any:
    """`(nw_kwargs)` -> (down, mid, up), each None when not given; `(is_sdxl, nw_kwargs)` -> one list or None."""
    is_later, layout, rest = _form(args, kwargs)
    arguments = rest[0] if rest else kwargs["nw_kwargs"]
    return _result(is_later, layout, blocks.weights_from_arguments(layout, arguments))


def get_block_lr_weight(*args: Any, **kwargs: Any) -> Any:
    """`([is_sdxl,] down_lr_weight, mid_lr_weight, up_lr_weight, zero_threshold)`; results as above."""
    is_later, layout, rest = _form(args, kwargs)

    def take(down_lr_weight: Any, mid_lr_weight: Any, up_lr_weight: Any, zero_threshold: float) -> Any:
        return blocks.side_weights(layout, down_lr_weight, mid_lr_weight, up_lr_weight, zero_threshold)

    return _result(is_later, layout, take(*rest, **kwargs))


def get_block_dims_and_alphas(
    *args: Any, **kwargs: Any
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """`([is_sdxl,] block_dims, block_alphas, network_dim, network_alpha, conv_block_dims, conv_block_alphas, conv_dim,
    conv_alpha)` -> ranks and alphas by block, then those of convolutions or None."""
    _, layout, rest = _form(args, kwargs)
    ranks = blocks.block_ranks(layout, *rest, **kwargs)
    return ranks.dims, ranks.alphas, ranks.conv_dims, ranks.conv_alphas


def remove_block_dims_and_alphas(
    *args: Any, **kwargs: Any
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """`(block_dims, block_alphas, conv_block_dims, conv_block_alphas, down, mid, up)`, or the same with `is_sdxl` first
    and one list of weights at the end: ranks of blocks with weight 0 become 0 (lists in place)."""
    is_later, layout, rest = _form(args, kwargs)

    def take(
        block_dims: list[int],
        block_alphas: list[float],
        conv_block_dims: list[int] | None,
        conv_block_alphas: list[float] | None,
        down_lr_weight: Sequence[float] | None = None,
        mid_lr_weight: float | None = None,
        up_lr_weight: Sequence[float] | None = None,
        block_lr_weight: Sequence[float] | None = None,
    ) -> blocks.BlockRanks:
        ranks = blocks.BlockRanks(block_dims, block_alphas, conv_block_dims, conv_block_alphas)
        if is_later:
            ranks.remove_zero_blocks(block_lr_weight if block_lr_weight is not None else down_lr_weight)
        else:
            mid = None if mid_lr_weight is None else [mid_lr_weight]
            ranks.remove_zero_blocks(blocks.all_weights(layout, down_lr_weight, mid, up_lr_weight))
        return ranks

    ranks = take(*rest, **kwargs)
    return ranks.dims, ranks.alphas, ranks.conv_dims, ranks.conv_alphas
