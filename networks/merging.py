"""Networks merged with each other or into a model, module by module, with the error of what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.messages import UserError, log, progress
from networks import algebra
from networks.adapter import find_layers
from networks.block_weights import strength
from networks.lora import LoRANetwork
from networks.oft import OFTModule
from networks.tool_files import Module, NetworkFile, common, first_few, module_names, refuse_kinds

LINEAR_TARGETS = tuple(LoRANetwork.UNET_TARGET_REPLACE_MODULE)
ALL_TARGETS = (*LINEAR_TARGETS, *LoRANetwork.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3)
TEXT_TARGETS = tuple(LoRANetwork.TEXT_ENCODER_TARGET_REPLACE_MODULE)
BlockWeights = Sequence[dict[int, float]]


# Network with network


@dataclass
class Merged:
    """A network made of others.

    Attributes:
        state: tensors of its file in the dtype of the merge, alphas in float32.
        ranks, alphas: module -> number.
        error: distance of the stored tensors from the exact sum of the networks' updates.
    """

    state: dict[str, Tensor]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    error: algebra.Error = field(default_factory=algebra.Error)

    @property
    def dim(self) -> Any:
        """`ss_network_dim`: the rank that all modules have, or `Dynamic`."""
        return common(self.ranks.values())

    @property
    def alpha(self) -> Any:
        """`ss_network_alpha`, the same."""
        return common(self.alphas.values())


def merge_networks(
    files: Sequence[NetworkFile],
    ratios: Sequence[float],
    dtype: torch.dtype,
    *,
    concat: bool = False,
    shuffle: bool = False,
    signed_up: bool = False,
    block_weights: BlockWeights | None = None,
    store_dtype: torch.dtype | None = None,
) -> Merged:
    """The networks' tensors added up, each times its ratio; a network alone then works with its ratio squared.

    Args:
        dtype: of the result; the sums are made in float32.
        concat: ranks side by side instead; each then works with ratio squared times its share of the ranks.
        shuffle: random order of the ranks, by torch's global generator.
        signed_up: a negative ratio turns both factors, so that its network works as with a positive one.
        block_weights: position -> strength for each file.
        store_dtype: dtype of the file, for the error.

    Raises:
        UserError: modules that have different sizes.
    """
    merged = Merged({})
    for name in progress(module_names(files), "merging modules"):
        parts = _parts(files, name)
        base_alpha = parts[0][1].alpha
        up = down = None
        for index, module in parts:
            factor = algebra.merge_factor(ratios[index], module.alpha, base_alpha)
            if block_weights:
                factor *= strength(block_weights[index], name)
            up_factor = factor if signed_up else abs(factor)
            try:
                down = algebra.add_up(down, module.down.float() * factor, concat=concat, dim=0)
                up = algebra.add_up(up, module.up.float() * up_factor, concat=concat, dim=1)
            except ValueError as sizes:
                others = f"{files[parts[0][0]].path} and {files[index].path}"
                remedy = "merge networks of one model" if concat else "give --concat, or use svd_merge_lora.py"
                raise UserError(f"{others} differ in size at {name}: {sizes}", remedy) from None
        assert up is not None and down is not None
        merged.ranks[name], merged.alphas[name] = down.shape[0], base_alpha
        merged.state[f"{name}.lora_down.weight"] = down.to(dtype)
        merged.state[f"{name}.lora_up.weight"] = up.to(dtype)
        merged.state[f"{name}.alpha"] = torch.tensor(base_alpha)
        stored = tuple(t.to(dtype).to(store_dtype or dtype) for t in (up, down))
        _add_error(merged.error, stored, base_alpha / down.shape[0], _terms(files, name, ratios, block_weights))
    if shuffle:
        shuffle_ranks(merged.state)
    return merged


def shuffle_ranks(state: dict[str, Tensor]) -> None:
    """Put every module's ranks in a random order, in place."""
    for key in [key for key in state if key.endswith(".lora_down.weight")]:
        other = key.replace("lora_down", "lora_up")
        state[other], state[key] = algebra.shuffled(state[other], state[key])


def merge_plain(
    files: Sequence[NetworkFile], ratios: Sequence[float], dtype: torch.dtype, store_dtype: torch.dtype | None = None
) -> Merged:
    """The oldest merge: both factors times the ratio, so that a network alone works with its ratio squared.

    Raises:
        UserError: alphas or sizes differ.
    """
    for name in module_names(files):
        alphas = {module.alpha for _, module in _parts(files, name)}
        if len(alphas) > 1:
            raise UserError(f"the networks have different alphas at {name}: {sorted(alphas)}", "use merge_lora.py")
    return merge_networks(files, ratios, dtype, signed_up=True, store_dtype=store_dtype)


def svd_merge(
    files: Sequence[NetworkFile],
    ratios: Sequence[float],
    dtype: torch.dtype,
    new_rank: int,
    new_conv_rank: int,
    device: torch.device,
    *,
    block_weights: BlockWeights | None = None,
    store_dtype: torch.dtype | None = None,
) -> Merged:
    """The sum of the networks' updates, each times its ratio, brought to a rank by its singular values.

    Raises:
        UserError: modules that have different sizes.
    """
    merged = Merged({})
    for name in progress(module_names(files), "merging modules"):
        terms = _terms(files, name, ratios, block_weights, device)
        shape = terms[0][1].shape[1:]
        all_up, all_down = algebra.stacked(terms)
        wanted = new_conv_rank if len(shape) == 3 and tuple(shape[1:]) != (1, 1) else new_rank
        rank = min(wanted, all_up.shape[0], all_down.shape[1])
        up, down = algebra.clamp(*algebra.decompose_product(all_up, all_down, rank).split(rank))
        up, down = (t.to(dtype).cpu().contiguous() for t in (up, down))
        _add_error(merged.error, (up.to(store_dtype or dtype), down.to(store_dtype or dtype)), 1.0, terms)
        if len(shape) == 3:
            up, down = up[:, :, None, None], down.view(rank, *shape)
        merged.ranks[name], merged.alphas[name] = rank, rank
        merged.state[f"{name}.lora_up.weight"], merged.state[f"{name}.lora_down.weight"] = up, down
        merged.state[f"{name}.alpha"] = torch.tensor(rank)
    return merged


def _parts(files: Sequence[NetworkFile], name: str) -> list[tuple[int, Module]]:
    found = ((index, file.module(name)) for index, file in enumerate(files))
    return [(index, module) for index, module in found if module is not None]


def _terms(
    files: Sequence[NetworkFile],
    name: str,
    ratios: Sequence[float],
    block_weights: BlockWeights | None,
    device: torch.device | str = "cpu",
) -> list[tuple[Tensor, Tensor, float]]:
    """(up, down, factor) of each file's update of a module.

    Raises:
        UserError: they belong to layers of different sizes.
    """
    terms: list[tuple[Tensor, Tensor, float]] = []
    for index, module in _parts(files, name):
        factor = ratios[index] * module.scale
        if block_weights:
            factor *= strength(block_weights[index], name)
        up, down = module.up.to(device), module.down.to(device)
        if terms and (up.shape[0] != terms[0][0].shape[0] or down[0].numel() != terms[0][1][0].numel()):
            sizes = f"{tuple(terms[0][1].shape)} and {tuple(down.shape)}"
            raise UserError(f"the networks belong to layers of different sizes at {name}: {sizes}", "give others")
        terms.append((up, down, factor))
    return terms


def _add_error(
    error: algebra.Error,
    stored: Sequence[Tensor],
    scale: float,
    terms: Sequence[tuple[Tensor, Tensor, float]],
) -> None:
    exact_up, exact_down = algebra.stacked(terms)
    up, down = (t.to(exact_up.device) for t in stored)
    both = algebra.stacked([(up, down, -scale), (exact_up, exact_down, 1.0)])
    error.add(algebra.product_norm(*both), algebra.product_norm(exact_up, exact_down))


# Network into model


def layers_by_name(
    text_encoders: Sequence[nn.Module], unet: nn.Module, targets: Sequence[str] = ALL_TARGETS, unet_prefix="lora_unet"
) -> dict[str, nn.Module]:
    """Name in network files -> layer of a model. Two text encoders are `te1` and `te2`."""
    prefixes = ["lora_te"] if len(text_encoders) == 1 else [f"lora_te{i + 1}" for i in range(len(text_encoders))]
    layers: dict[str, nn.Module] = {}
    for prefix, encoder in zip(prefixes, text_encoders, strict=True):
        layers.update(find_layers(encoder, prefix, TEXT_TARGETS, is_text_encoder=True))
    layers.update(find_layers(unet, unet_prefix, targets))
    return layers


def merge_into_layers(
    layers: Mapping[str, nn.Module],
    files: Sequence[NetworkFile],
    ratios: Sequence[float],
    *,
    linear_only: bool = False,
    block_weights: BlockWeights | None = None,
    store_dtype: torch.dtype | None = None,
) -> algebra.Error:
    """Add the networks' updates to the layers' weights: `W + sum of ratio * alpha / rank * up down`.

    The sum is made in float32 and rounded once to the weight's dtype.

    Args:
        linear_only: leave out convolutions other than 1x1.
        store_dtype: dtype of the file, for the error.

    Returns:
        Distance of the stored weights from the exact ones, relative to the change.

    Raises:
        UserError: a file has no module for these layers, or modules of other sizes.
    """
    own = [name.removeprefix("lora_unet_") for name in layers if name.startswith("lora_unet_")]
    for file in files:
        _say_left_out(file, file.under_names_of(own), layers)

    def change(layer: nn.Module, name: str) -> Tensor | None:
        total = None
        for index, module in _parts(files, name):
            if linear_only and module.is_conv:
                continue
            factor = ratios[index] * module.scale
            if block_weights:
                factor *= strength(block_weights[index], name)
            update = algebra.delta(module.up, module.down, factor)
            if update.numel() != layer.weight.numel() or update.shape[0] != layer.weight.shape[0]:
                sizes = f"{tuple(update.shape)} for a layer of {tuple(layer.weight.shape)}"
                raise UserError(f"{files[index].path} is {files[index].kind}: {name} is {sizes}", "give another model")
            update = update.view(layer.weight.shape).to(layer.weight.device)
            total = update if total is None else total + update
        return total

    return _change_layers(layers, change, store_dtype)


def rotate_layers(
    layers: Mapping[str, nn.Module], file: NetworkFile, *, store_dtype: torch.dtype | None = None
) -> algebra.Error:
    """Rotate the layers' weights by an OFT file, at full strength; the error as in `merge_into_layers`.

    Raises:
        UserError: the file's blocks do not fit the layers.
    """
    names = {key.partition(".")[0] for key in file.checkpoint.tensors}
    if not names & layers.keys():
        raise UserError(f"{file.path}: no layer of this model has its names", "give an OFT file for this model")

    def change(layer: nn.Module, name: str) -> Tensor | None:
        if name not in names:
            return None
        tensors = file.checkpoint.read([f"{name}.oft_blocks", f"{name}.alpha"], device=layer.weight.device)
        blocks = tensors[f"{name}.oft_blocks"]
        module = OFTModule(name, layer, 1.0, blocks.shape[0], tensors[f"{name}.alpha"]).to(layer.weight.device)
        if module.oft_blocks.shape != blocks.shape:
            sizes = f"{tuple(blocks.shape)} for {layer.weight.shape[0]} rows"
            raise UserError(f"{file.path}: {name} is {sizes}", "give an OFT file for this model")
        module.oft_blocks.copy_(blocks)
        return module.merged_weight(layer.weight) - layer.weight.float()

    return _change_layers(layers, change, store_dtype)


@torch.no_grad()
def _change_layers(
    layers: Mapping[str, nn.Module],
    change: Callable[[nn.Module, str], Tensor | None],
    store_dtype: torch.dtype | None,
) -> algebra.Error:
    error = algebra.Error()
    for name, layer in progress(layers.items(), "merging layers", total=len(layers)):
        update = change(layer, name)
        if update is None:
            continue
        exact = layer.weight.float() + update
        layer.weight.copy_(exact)
        stored = layer.weight.to(store_dtype or layer.weight.dtype).float()
        error.add((stored - exact).norm().item(), update.norm().item())
    return error


def _say_left_out(file: NetworkFile, modules: Sequence[str], layers: Mapping[str, Any]) -> None:
    left_out = [name for name in modules if name not in layers]
    if len(left_out) == len(modules):
        raise UserError(f"{file.path} is {file.kind}: no layer of this model has its names", "give another model")
    if left_out:
        log.warning(
            "%s: %d of %d modules have no layer in this model and are left out: %s",
            file.path,
            len(left_out),
            len(modules),
            first_few(left_out),
        )


def refuse_sdxl(files: Sequence[NetworkFile]) -> None:
    """Stop at networks for SDXL where an SD 1.x or 2.x model is merged."""
    refuse_kinds(files, ("a network for SDXL",), "use sdxl_merge_lora.py")
