"""LoRA files of diffusers and peft, to and from the names that files of this program have.

A module is `unet.PATH.lora_A.weight` (r, in), `.lora_B.weight` (out, r) there; alphas stand in the metadata, as
`lora_adapter_metadata` of diffusers or `adapter_config.json` of peft, and are the rank where they are missing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.messages import UserError
from networks import files, names

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
# Suffixes of all versions of both libraries; `processor` levels are those of old attention processors.
_SUFFIX = re.compile(
    r"(?:\.lora_(?P<letter>[AB])(?:\.default)?\.weight"
    r"|\.(?:lora|lora_linear_layer)\.(?P<word>down|up)\.weight"
    r"|_lora\.(?P<old>down|up)\.weight)$"
)
_SIDES = {"A": "lora_down", "B": "lora_up", "down": "lora_down", "up": "lora_up"}


@dataclass(frozen=True, slots=True)
class _Key:
    component: str
    path: str
    side: str


def is_diffusers(keys: Any) -> bool:
    """Whether the keys are those of a LoRA of diffusers or peft."""
    return any(_SUFFIX.search(key) for key in keys)


def to_kohya(
    weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """A diffusers or peft LoRA under this program's names, each module with `alpha`, `lora_down`, `lora_up`.

    U-Net names have the style of the family's files: Stability's for SDXL, diffusers' for SD 1.x/2.x.

    Args:
        metadata: of the file, which may hold alphas.
        config: peft's `adapter_config.json`.

    Raises:
        UserError: tensors that are no plain LoRA.
    """
    modules: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[tuple[str, str], Tensor] = {}
    left = []
    for key, value in weights.items():
        parsed = _parse(key)
        if parsed is not None:
            modules.setdefault((parsed.component, parsed.path), {})[parsed.side] = value
        elif key.endswith(".alpha"):
            component, path = _component(key.removesuffix(".alpha"))
            alphas[component, path] = value
        else:
            left.append(key)
    if left:
        raise UserError(
            f"{len(left)} tensors are not those of a plain LoRA, the first is {left[0]}", "convert plain LoRA"
        )
    settings = _Settings(metadata, config)
    is_sdxl = _is_sdxl(modules)
    result: dict[str, Tensor] = {}
    for (component, path), sides in modules.items():
        if set(sides) != {"lora_down", "lora_up"}:
            raise UserError(f"{component}.{path} has {', '.join(sides)} only", "the file is incomplete")
        name = _prefix(component, is_sdxl) + "_" + path.replace(".", "_")
        down = sides["lora_down"]
        given = alphas.get((component, path))
        alpha = settings.alpha(component, path, down.shape[0]) if given is None else float(given)
        result[f"{name}.alpha"] = torch.tensor(alpha, dtype=down.dtype)
        result[f"{name}.lora_down.weight"], result[f"{name}.lora_up.weight"] = down, sides["lora_up"]
    if files.kind_of(result) == "a network for SD 2.x":
        result = {key: _as_conv(key, value) for key, value in result.items()}
    return names.rename_unet(result, "stability", "sdxl") if is_sdxl else result


def from_kohya(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This program's LoRA as diffusers has it: tensors, and the contents of `lora_adapter_metadata`.

    Raises:
        UserError: the file is no plain LoRA.
    """
    files.refuse_foreign_methods(weights, "the network")
    kind = files.kind_of(weights)
    if not kind.startswith("a network for S"):
        raise UserError(f"the file is {kind}", "only LoRA files can be converted")
    weights = names.rename_unet(weights, "diffusers", "sdxl" if "SDXL" in kind else "sd")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for name, entries in files.group_by_module(weights).items():
        prefix = next((p for p in ("lora_te1", "lora_te2", "lora_te", "lora_unet") if name.startswith(f"{p}_")), None)
        if prefix is None or not {"lora_down.weight", "lora_up.weight"} <= entries.keys():
            raise UserError(f"{name} is no LoRA module of Stable Diffusion", "only LoRA files can be converted")
        component, path = COMPONENTS[prefix], names.dotted(name[len(prefix) + 1 :])
        down, up = entries["lora_down.weight"], entries["lora_up.weight"]
        if kind == "a network for SD 2.x" and path.endswith(("proj_in", "proj_out")):
            down, up = down.flatten(1), up.flatten(1)
        tensors[f"{component}.{path}.lora_A.weight"], tensors[f"{component}.{path}.lora_B.weight"] = down, up
        ranks.setdefault(component, {})[path] = down.shape[0]
        alpha = entries.get("alpha")
        alphas.setdefault(component, {})[path] = float(down.shape[0] if alpha is None else alpha)
    return tensors, {
        f"{component}.{key}": value
        for component in ranks
        for key, value in adapter_config(ranks[component], alphas[component]).items()
    }


def adapter_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """peft's settings of one model: the commonest rank and alpha, the others by module.

    The level `text_model` is left out of names: transformers 5 has it no more, and peft compares ends of names.
    """
    ranks = {path.removeprefix("text_model."): rank for path, rank in ranks.items()}
    alphas = {path.removeprefix("text_model."): alpha for path, alpha in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def config_beside(file: str) -> dict[str, Any] | None:
    """peft's `adapter_config.json` beside an `adapter_model.safetensors`."""
    path = Path(file).with_name("adapter_config.json")
    if Path(file).stem != "adapter_model" or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


class _Settings:
    """Alphas from a file's metadata or from peft's settings."""

    def __init__(self, metadata: Mapping[str, str] | None, config: Mapping[str, Any] | None) -> None:
        self.metadata = json.loads((metadata or {}).get(METADATA_KEY, "{}"))
        self.config = config

    def alpha(self, component: str, path: str, rank: int) -> float:
        def value(key: str) -> Any:
            return self.config.get(key) if self.config else self.metadata.get(f"{component}.{key}")

        for pattern, alpha in (value("alpha_pattern") or {}).items():
            if path == pattern or path.endswith(f".{pattern}"):
                return float(alpha)
        common = value("lora_alpha")
        return float(rank if common is None else common)


def _parse(key: str) -> _Key | None:
    match = _SUFFIX.search(key)
    if match is None:
        return None
    side = _SIDES[match["letter"] or match["word"] or match["old"]]
    path = key[: match.start()].replace(".processor.", ".")
    if match["old"] and path.endswith("to_out"):
        path += ".0"
    return _Key(*_component(path), side)


def _component(path: str) -> tuple[str, str]:
    """`unet.PATH`, `text_encoder.PATH`, `base_model.model.PATH` -> (component, path)."""
    path = path.removeprefix("base_model.model.")
    head, _, rest = path.partition(".")
    if head in ("unet", "text_encoder", "text_encoder_2"):
        path, component = rest.removeprefix("base_model.model."), head
    else:
        component = "text_encoder" if re.match(r"(?:text_model|encoder|text_projection)\b", path) else "unet"
    if component != "unet" and path.startswith("encoder."):
        path = f"text_model.{path}"
    return component, path


def _prefix(component: str, is_sdxl: bool) -> str:
    if component == "unet":
        return "lora_unet"
    return {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component] if is_sdxl else "lora_te"


def _is_sdxl(modules: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> bool:
    if any(component == "text_encoder_2" for component, _ in modules):
        return True
    flat = {
        f"lora_unet_{path.replace('.', '_')}.{side}.weight": tensor
        for (component, path), sides in modules.items()
        if component == "unet"
        for side, tensor in sides.items()
    }
    return "SDXL" in files.kind_of(flat)


def _as_conv(key: str, value: Tensor) -> Tensor:
    """SD 2.x files hold the projections around the transformers as 1x1 convolutions."""
    is_projection = re.search(r"_proj_(?:in|out)\.lora_", key) and key.startswith("lora_unet_")
    return value[:, :, None, None] if is_projection and value.dim() == 2 else value
