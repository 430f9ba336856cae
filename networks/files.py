"""Network files: reading, writing with hashes, what the keys of a file say about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.messages import UserError, log
from library.models.checkpoint import is_safetensors_name, open_checkpoint
from library.models.checkpoint_writer import save_tensors
from library.models.hashes import network_hashes

# First match wins: (pattern over the keys, what such a file is).
_FAMILIES = (
    (r"^lllite_unet_", "a ControlNet-LLLite file"),
    (r"^oft_unet_|\.oft_blocks$", "an OFT network"),
    (r"^bundle_emb\.|^(emb_params|clip_l|clip_g|IN0\d|MID|OUT\d\d)$", "an embedding"),
    (r"^model\.diffusion_model\.|^first_stage_model\.", "a whole model"),
    (r"^(unet|text_encoder|base_model)\..*lora", "a diffusers or peft LoRA"),
    (r"^lora_unet_(double|single)_blocks_|^lora_te3_|^lora_transformer_", "a network for Flux or SD3"),
    (
        r"^lora_te[12]_|^lora_unet_(label_emb|add_embedding)|attentions_\d_transformer_blocks_[1-9]",
        "a network for SDXL",
    ),
    (r"^lora_unet_(input|output|middle)_blocks?_.*_transformer_blocks_[1-9]", "a network for SDXL"),
)
_WIDTHS = {768: "a network for SD 1.x", 1024: "a network for SD 2.x", 2048: "a network for SDXL"}
_FOREIGN = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "Tucker LoCon",
    r"\.dora_scale$": "DoRA",
    r"\.(w_norm|b_norm|diff|diff_b)$": "full-weight",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
}


def read_weights(file: str) -> dict[str, Tensor]:
    """The tensors of a network file, safetensors or torch pickle.

    Raises:
        UserError: not there, truncated, or not a file of tensors.
    """
    return open_checkpoint(file).read()


def write_weights(
    state: Mapping[str, Tensor], file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write tensors atomically; a `.safetensors` file gets metadata with `sshs_model_hash` and `sshs_legacy_hash`.

    Args:
        dtype: of every tensor; None = as they are.
    """
    tensors = {key: value.detach().to("cpu", dtype or value.dtype) for key, value in state.items()}
    texts = dict(metadata or {})
    if is_safetensors_name(file):
        texts["sshs_model_hash"], texts["sshs_legacy_hash"] = network_hashes(tensors, texts)
    save_tensors(file, tensors, texts)


def group_by_module(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`NAME.rest` -> {NAME: {rest: tensor}}; keys without a dot are left out."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        name, dot, rest = key.partition(".")
        if dot:
            modules.setdefault(name, {})[rest] = value
    return modules


def kind_of(weights: Mapping[str, Tensor]) -> str:
    """What the keys of a file say it is: `a network for SDXL`, `an embedding`, ..."""
    for pattern, kind in _FAMILIES:
        if any(re.search(pattern, key) for key in weights):
            return kind
    for key, value in weights.items():
        if re.search(r"attn2_to_[kv]\.lora_down", key) and value.dim() >= 2 and value.shape[1] in _WIDTHS:
            return _WIDTHS[value.shape[1]]
    return "a network for SD 1.x or 2.x" if any(key.startswith("lora_") for key in weights) else "no network"


def refuse_foreign_methods(weights: Mapping[str, Tensor], file: str) -> None:
    """Stop on tensors of another method, which would be dropped and change the pictures."""
    for pattern, method in _FOREIGN.items():
        if any(re.search(pattern, key) for key in weights):
            raise UserError(
                f"{file} holds {method} weights, not plain LoRA", "use --network_module lycoris.kohya for it"
            )


def same_but_ones(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes differ only by ones at their ends: a matrix and a 1x1 convolution."""
    short, long = sorted((tuple(a), tuple(b)), key=len)
    return short != long and len(short) > 0 and long == (*short, *[1] * (len(long) - len(short)))


def check_match(weights: Mapping[str, Tensor], adapters: Iterable[Any], file: str) -> None:
    """Compare a file's tensors with the adapters that are to take them.

    Raises:
        UserError: no module, or no U-Net module, of the file has an adapter here; or the sizes differ.
    """
    own = {adapter.lora_name: adapter for adapter in adapters}
    modules = group_by_module(weights)
    known = [name for name in modules if name in own]
    unet = [name for name in modules if "_unet_" in name]
    has_unet = any("_unet_" in name for name in own)
    if not known or (has_unet and unet and not own.keys() & set(unet)):
        remedy = "it does not fit this model; give a network of the model's family"
        raise UserError(f"{file} is {kind_of(weights)}", remedy)
    for name in known:
        shapes = {key: tensor.shape for key, tensor in own[name].state_dict().items()}
        for key, tensor in modules[name].items():
            if key in shapes and shapes[key] != tensor.shape and not same_but_ones(shapes[key], tensor.shape):
                raise UserError(
                    f"{file} is {kind_of(weights)}: {name}.{key} is {tuple(tensor.shape)}, here {tuple(shapes[key])}",
                    "give a network of the model's family, or --dim_from_weights if only the rank differs",
                )
    unknown = [name for name in modules if name not in own]
    if unknown:
        left_out = f"{len(unknown)} of {len(modules)} modules have no layer here and are left out"
        log.warning("%s: %s (%s ...)", file, left_out, unknown[0])
