"""A network's modules brought to other ranks by their singular values, and a DyLoRA cut into networks of one rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.messages import UserError, log, progress, write
from library.options.network_tools import NetworkResizeConfig, NetworkSplitConfig
from library.runtime.devices import pick_device
from networks import algebra, files
from networks.tool_files import PEFT, Pair, dtype_of, find_pairs, open_network, say_error

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")

Read = Callable[[Collection[str]], Mapping[str, Tensor]]


@dataclass
class Resized:
    """A resized network.

    Attributes:
        state: its tensors in the dtype of the file.
        old_rank: largest rank before.
        new_alpha: alpha of the last module.
        lines: what each module keeps, as text.
        fro_retained: share of each module's Frobenius norm that is kept; NaN for a module of zeros.
        error: distance of the stored tensors from the input.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    old_rank: int = 0
    new_alpha: float = 0.0
    lines: list[str] = field(default_factory=list)
    fro_retained: list[float] = field(default_factory=list)
    error: algebra.Error = field(default_factory=algebra.Error)


@dataclass(frozen=True)
class Wanted:
    """The ranks that are wanted.

    Attributes:
        rank, conv_rank: of matrices, and of convolutions (every 4-D weight); with a method the largest ones.
        method, param: name in `algebra.RANK_RULES` and its parameter; None = the ranks as they are.
    """

    rank: int
    conv_rank: int
    method: str | None = None
    param: float | None = None


def resize(keys: Sequence[str], read: Read, wanted: Wanted, dtype: torch.dtype, device: torch.device) -> Resized:
    """Resize every module; tensors that belong to none are only cast.

    Args:
        keys: the network's keys in order.
        read: gives the tensors of some keys.
        dtype: of the result.
        device: that decomposes.

    Raises:
        UserError: no low-rank module, or a kernel that is not square.
    """
    pairs = find_pairs(keys)
    if not pairs:
        raise UserError("the network has no lora_up and lora_down tensors", "give a LoRA file")
    result, known = Resized(), set(keys)
    for name, pair in progress(pairs.items(), "resizing modules", total=len(pairs)):
        tensors = read([key for key in (pair.up, pair.down, pair.alpha) if key in known])
        _resize_module(result, name, pair, tensors, wanted, dtype, device)
    rest = [key for key in keys if key not in result.state]
    for key in rest:
        value = read([key])[key]
        result.state[key] = value.to(dtype) if value.is_floating_point() else value
    return result


def _resize_module(
    result: Resized,
    name: str,
    pair: Pair,
    tensors: Mapping[str, Tensor],
    wanted: Wanted,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    up, down = tensors[pair.up].to(device), tensors[pair.down].to(device)
    old_rank = down.shape[0]
    result.old_rank = max(result.old_rank, old_rank)
    if down.dim() == 4 and down.shape[2] != down.shape[3]:
        raise UserError(f"{name} has a kernel of {tuple(down.shape[2:])}", "only square kernels can be resized")
    has_alpha = pair.alpha in tensors
    scale = float(tensors[pair.alpha]) / old_rank if has_alpha else 1.0
    most = wanted.conv_rank if down.dim() == 4 else wanted.rank
    new_up, new_down, facts = resize_pair(up, down, most, wanted.method, wanted.param, scale)
    new_up, new_down = (t.to(dtype).cpu().contiguous() for t in (new_up, new_down))
    result.state[pair.down], result.state[pair.up] = new_down, new_up
    # peft and diffusers know no alpha beside their tensors; where a kohya-style file has none it counts as the rank.
    if has_alpha or "lora_down" in pair.down:
        result.state[pair.alpha] = torch.tensor(facts["new_alpha"]).to(dtype)
    result.new_alpha = facts["new_alpha"]
    distance = algebra.stacked([(new_up.to(device), new_down.to(device), -1.0), (up, down, 1.0)])
    result.error.add(scale * algebra.product_norm(*distance), scale * algebra.product_norm(up, down))
    result.fro_retained.append(facts["fro_retained"])
    result.lines.append(_line(name, facts, with_rank=wanted.method is not None))


def resize_pair(
    up: Tensor, down: Tensor, rank: int, method: str | None, param: float | None, scale: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(up, down) of the new rank in the shapes that files have, and the numbers of `algebra.rank_resize`."""
    side = min(up.shape[0], down[0].numel())
    parts = algebra.decompose_product(up.flatten(1), down, min(rank, side))
    facts = algebra.rank_resize(algebra.padded(parts.S, side), min(rank, side), method, param, scale)
    new_rank = int(facts["new_rank"])
    if new_rank > parts.U.shape[1]:
        parts = algebra.decompose(algebra.matrix(up) @ algebra.matrix(down))
    new_up, new_down = parts.split(new_rank)
    if down.dim() == 4:
        new_up, new_down = new_up[:, :, None, None], new_down.reshape(new_rank, *down.shape[1:])
    return new_up, new_down, facts


def _line(name: str, facts: Mapping[str, float], with_rank: bool) -> str:
    text = (
        f"{name}: sum(S) retained {facts['sum_retained']:.1%}, Frobenius norm retained {facts['fro_retained']:.1%}, "
        f"max ratio {facts['max_ratio']:.1f}"
    )
    return text + (f", dim {facts['new_rank']:.0f}, alpha {facts['new_alpha']:g}" if with_rank else "")


def resized_metadata(metadata: Mapping[str, str], wanted: Wanted, result: Resized) -> dict[str, str]:
    """The input's metadata with the new rank and alpha and a note in the comment."""
    new = dict(metadata)
    comment = new.get("ss_training_comment", "")
    conv = f" (conv: {wanted.conv_rank})" if wanted.conv_rank != wanted.rank else ""
    if wanted.method is None:
        new["ss_training_comment"] = f"dimension is resized from {result.old_rank} to {wanted.rank}{conv}; {comment}"
        new["ss_network_dim"], new["ss_network_alpha"] = str(wanted.rank), str(result.new_alpha)
    else:
        new["ss_training_comment"] = (
            f"Dynamic resize with {wanted.method}: {wanted.param} from {result.old_rank}{conv}; {comment}"
        )
        new["ss_network_dim"] = new["ss_network_alpha"] = "Dynamic"
    return new


def split_ranks(max_rank: int, unit: int) -> list[int]:
    """The ranks that a DyLoRA is cut to: unit, 2 unit, ... below its own."""
    return list(range(unit, max_rank, unit))


def max_rank_of(shapes: Mapping[str, Any]) -> int:
    """Largest rank of a network: key -> shape."""
    return max((shape[0] for key, shape in shapes.items() if "lora_down" in key), default=0)


def split_metadata(metadata: Mapping[str, str], max_rank: int, rank: int) -> dict[str, str]:
    """The input's metadata for one of the cut networks."""
    comment = f"split from DyLoRA, rank {max_rank} to {rank}; {metadata.get('ss_training_comment', '')}"
    return {**metadata, "ss_training_comment": comment, "ss_network_dim": str(rank)}


def resize_network(options: NetworkResizeConfig) -> None:
    """`resize_lora.py`."""
    assert options.model is not None and options.save_to is not None
    wanted = _wanted(options)
    if not options.save_to.endswith(SUFFIXES):
        raise UserError(f"--save_to {options.save_to} has no known suffix", f"end it in {', '.join(SUFFIXES)}")
    file = open_network(options.model, (PEFT,))
    dtype = dtype_of(options.save_precision) or torch.float32
    checkpoint = file.checkpoint
    result = resize(list(checkpoint.tensors), checkpoint.read, wanted, dtype, pick_device(options.device))
    if options.verbose:
        write("\n".join(result.lines))
        kept = [share for share in result.fro_retained if share == share]
        if kept:
            write(f"Frobenius norm retained: mean {statistics.mean(kept):.2%}, std {statistics.pstdev(kept):.3%}")
    files.write_weights(result.state, options.save_to, dtype, resized_metadata(file.metadata, wanted, result))
    log.info("saved %s", options.save_to)
    say_error(result.error.relative, "the network's update")


def _wanted(options: NetworkResizeConfig) -> Wanted:
    if options.dynamic_method and not options.dynamic_param:
        raise UserError("--dynamic_method without --dynamic_param", "give the ratio or share that it takes")
    conv_rank = options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    if min(options.new_rank, conv_rank) < 1:
        raise UserError(f"a rank of {min(options.new_rank, conv_rank)}", "give --new_rank 1 or more")
    return Wanted(options.new_rank, conv_rank, options.dynamic_method, options.dynamic_param)


def split_network(options: NetworkSplitConfig) -> None:
    """`extract_lora_from_dylora.py`: one file a rank, each tensor read when its turn comes."""
    assert options.model is not None and options.save_to is not None and options.unit is not None
    if options.unit < 1:
        raise UserError(f"--unit {options.unit}", "give 1 or more")
    file = open_network(options.model)
    max_rank = max_rank_of({key: info.shape for key, info in file.checkpoint.tensors.items()})
    ranks = split_ranks(max_rank, options.unit)
    if not ranks:
        raise UserError(f"{options.model} has rank {max_rank}, --unit is {options.unit}", "give a smaller one")
    target = Path(options.save_to)
    state = file.checkpoint.read()
    for rank in progress(ranks, "writing files"):
        path = target.with_name(f"{target.stem}-{rank:04d}{target.suffix}")
        metadata = split_metadata(file.metadata, max_rank, rank)
        files.write_weights(algebra.first_ranks(state, rank), str(path), None, metadata)
        log.info("saved %s: the first %d of %d ranks, exact", path, rank, max_rank)
