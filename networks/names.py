"""Names of modules in network files: paths with underscores, and the two styles in which U-Net paths are written.

Stability's style (`input_blocks_1_1_...`) is that of SDXL files, diffusers' (`down_blocks_0_attentions_0_...`) that of
SD 1.x/2.x files. Either is understood for either family.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Literal

from torch import Tensor, nn

from library.models.key_maps import sd_unet_map, sdxl_unet_map
from networks.files import kind_of

Style = Literal["stability", "diffusers"]
Family = Literal["sd", "sdxl"]

_PREFIX = re.compile(r"^((?:lora|oft)_unet_)")
_STABILITY = re.compile(r"^(?:(?:lora|oft)_unet_)?(?:input_blocks|middle_block|output_blocks|label_emb|time_embed)_\d")
_DIFFUSERS = re.compile(r"^(?:(?:lora|oft)_unet_)?(?:down_blocks_|up_blocks_|mid_block_|(?:time|add)_embedding_)")
_DEEP = re.compile(r"^oft_unet_.*_transformer_blocks_[1-9]")  # only SDXL stacks transformer blocks
# Parts of module paths that have underscores of their own.
_WORDS = {
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2", "time_embed", "label_emb"),
    *("in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection"),
}


def unet_names(unet: nn.Module) -> list[str]:
    """Paths of a U-Net's modules in the form that module names have in files."""
    return [path.replace(".", "_") for path, _ in unet.named_modules()]


def style_of(names: Iterable[str]) -> Style | None:
    """The style of U-Net names or of keys of a file; None without a U-Net module whose name tells it."""
    for name in names:
        if _STABILITY.match(name):
            return "stability"
        if _DIFFUSERS.match(name):
            return "diffusers"
    return None


def dotted(name: str) -> str:
    """The path of a module from its name with underscores, prefix taken off: `a_proj_in` -> `a.proj_in`."""
    words, parts = name.split("_"), []
    while words:
        length = next((n for n in (3, 2) if "_".join(words[:n]) in _WORDS), 1)
        parts.append("_".join(words[:length]))
        words = words[length:]
    return ".".join(parts)


def convert_if_needed(weights: Mapping[str, Tensor], own_names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the U-Net's own style of names, where the file has the other one.

    Args:
        own_names: names or paths of the U-Net's modules, with underscores.
    """
    own, is_for_sdxl = style_of(own_names), "SDXL" in kind_of(weights) or any(_DEEP.search(key) for key in weights)
    has_other = any(style_of((key,)) not in (own, None) for key in weights)
    if own is None or not has_other or is_for_sdxl != (own == "stability"):
        return dict(weights)
    return rename_unet(weights, own, "sdxl" if is_for_sdxl else "sd")


def rename_unet(weights: Mapping[str, Tensor], style: Style, family: Family) -> dict[str, Tensor]:
    """The tensors with U-Net names in a style; other tensors, and names that have it already, stay."""
    return {_renamed(key, style, family): value for key, value in weights.items()}


def convert_diffusers_to_sai_if_needed(weights_sd: MutableMapping[str, Tensor]) -> None:
    """Give an SDXL file's U-Net tensors Stability's names where it has diffusers' (in place)."""
    if any(style_of((key,)) == "diffusers" for key in weights_sd):
        renamed = rename_unet(weights_sd, "stability", "sdxl")
        weights_sd.clear()
        weights_sd.update(renamed)


def _renamed(key: str, style: Style, family: Family) -> str:
    match = _PREFIX.match(key)
    if match is None or style_of((key,)) == style:
        return key
    table = _table(style, family)
    name, dot, rest = key[match.end() :].partition(".")
    prefix = name
    while prefix and prefix not in table:
        prefix = prefix.rpartition("_")[0]
    return match[1] + (table[prefix] + name[len(prefix) :] if prefix else name) + dot + rest


@functools.cache
def _table(style: Style, family: Family) -> dict[str, str]:
    rules = (sd_unet_map() if family == "sd" else sdxl_unet_map()).rules
    pairs = [(theirs.replace(".", "_"), ours.replace(".", "_")) for theirs, ours in rules]
    return {ours: theirs for theirs, ours in pairs} if style == "stability" else dict(pairs)
