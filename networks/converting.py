"""LoRA files from one form to another; docs/networks.md says which program reads which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from library.messages import UserError, log
from library.models.checkpoint import open_checkpoint
from library.models.checkpoint_writer import save_tensors
from library.options.network_convert import NetworkConvertConfig
from library.runtime.files import atomic_path
from networks import clients, diffusers_format, files, names

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def convert_file(options: NetworkConvertConfig) -> None:
    """`convert_lora.py`.

    Raises:
        UserError: the file is no plain LoRA of Stable Diffusion, or a folder where a file is to be.
    """
    assert options.model is not None and options.save_to is not None
    source, target = Path(options.model), Path(options.save_to)
    if options.to != "peft" and target.is_dir():
        raise UserError(f"--save_to {target} is a folder", "give a file name, or --to peft")
    weights, metadata = open_lora(source)
    metadata.pop(diffusers_format.METADATA_KEY, None)
    modules = len(files.group_by_module(weights))
    if options.to == "peft":
        write_peft(weights, target)
        log.info("%s: %d modules for peft in %s", source, modules, target)
        return
    if options.to == "diffusers":
        weights, settings = diffusers_format.from_kohya(weights)
        metadata[diffusers_format.METADATA_KEY] = json.dumps(settings, sort_keys=True)
    else:
        weights = in_style(weights, options.to)
    files.write_weights(weights, str(target), None, metadata)
    log.info("%s: %d modules in %s; %s", source, modules, target, clients.line(weights))


def open_lora(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA in any form, as tensors under this program's names, and the metadata of its file.

    Args:
        source: a file; a peft folder; or a folder of such folders, one for each part of the model.
    """
    if not source.is_dir():
        checkpoint = open_checkpoint(source)
        weights = checkpoint.read()
        if diffusers_format.is_diffusers(weights):
            config = diffusers_format.config_beside(str(source))
            weights = diffusers_format.to_kohya(weights, checkpoint.metadata, config)
        files.refuse_foreign_methods(weights, str(source))
        return weights, dict(checkpoint.metadata)
    parts = {name: source / name for name in ("text_encoder", "text_encoder_2", "unet")}
    found = {name: folder for name, folder in parts.items() if (folder / PEFT_FILE).is_file()}
    if not found and (source / PEFT_FILE).is_file():
        return open_lora(source / PEFT_FILE)
    if not found:
        raise UserError(f"{source} holds no {PEFT_FILE}", f"give a folder with it, or with {', '.join(parts)} in it")
    joined: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, folder in found.items():
        for key, value in open_checkpoint(folder / PEFT_FILE).read().items():
            joined[f"{name}.{key}"] = value
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        settings |= {f"{name}.{key}": config.get(key) for key in ("lora_alpha", "alpha_pattern")}
    return diffusers_format.to_kohya(joined, {diffusers_format.METADATA_KEY: json.dumps(settings)}), {}


def in_style(weights: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """The tensors with U-Net names in the style that a form asks for (`kohya`: that of the family's files)."""
    is_sdxl = "SDXL" in files.kind_of(weights)
    family = "sdxl" if is_sdxl else "sd"
    own = "stability" if is_sdxl else "diffusers"
    style = {"kohya_stability_names": "stability", "kohya_diffusers_names": "diffusers"}.get(form, own)
    return names.rename_unet(weights, "stability" if style == "stability" else "diffusers", family)


def write_peft(weights: Mapping[str, Tensor], folder: Path) -> None:
    """A LoRA as peft has it: `unet`, `text_encoder`, `text_encoder_2` with `adapter_model` and its settings."""
    tensors, settings = diffusers_format.from_kohya(weights)
    for component in dict.fromkeys(key.partition(".")[0] for key in tensors):
        own = {key.removeprefix(f"{component}."): t for key, t in tensors.items() if key.startswith(f"{component}.")}
        config = {k.removeprefix(f"{component}."): v for k, v in settings.items() if k.startswith(f"{component}.")}
        config |= {"peft_type": "LORA", "bias": "none", "inference_mode": True}
        (folder / component).mkdir(parents=True, exist_ok=True)
        save_tensors(
            folder / component / PEFT_FILE, {f"base_model.model.{key}": value for key, value in own.items()}, {}
        )
        with atomic_path(folder / component / PEFT_CONFIG) as partial:
            Path(partial).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
