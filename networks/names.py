"""The two naming styles of U-Net modules in network files: Stability's (`input_blocks_1_1_...`) and diffusers'
(`down_blocks_0_attentions_0_...`). SD 1.x/2.x files normally have the second; the first is understood as well.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from library.models.key_maps import sd_unet_map
from networks.files import kind_of

_PREFIX = re.compile(r"^(lora_unet_)(?=(?:input_blocks|middle_block|output_blocks)_)")


def unet_names(unet: nn.Module) -> list[str]:
    """Paths of a U-Net's modules in the form that module names have in files."""
    return [path.replace(".", "_") for path, _ in unet.named_modules()]


def convert_if_needed(weights: Mapping[str, Tensor], own_names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under diffusers names, if the file has Stability names and the U-Net diffusers ones.

    Args:
        own_names: names or paths of the U-Net's modules, with underscores.
    """
    is_foreign = any(_PREFIX.match(key) for key in weights)
    if not is_foreign or not any("down_blocks_" in name for name in own_names) or "SDXL" in kind_of(weights):
        return dict(weights)
    return {_to_diffusers(key): value for key, value in weights.items()}


def _to_diffusers(key: str) -> str:
    match = _PREFIX.match(key)
    if match is None:
        return key
    name, dot, rest = key[match.end() :].partition(".")
    prefix = name
    while prefix and prefix not in _table():
        prefix = prefix.rpartition("_")[0]
    return match[1] + (_table()[prefix] + name[len(prefix) :] if prefix else name) + dot + rest


@functools.cache
def _table() -> dict[str, str]:
    return {theirs.replace(".", "_"): ours.replace(".", "_") for theirs, ours in sd_unet_map().rules}
