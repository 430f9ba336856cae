"""Parts of a model opened alone, for programs that need no U-Net."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from library.messages import UserError
from library.models import sdxl_loading
from library.models.assembly import fill
from library.models.converting import describe_source
from library.models.dimensions import KIND_NAMES
from library.models.folders import open_part, resolve_folder
from library.models.loading import refuse_no_model_folder
from library.models.text_encoders import restore_buffers

SDXL_ENCODERS = ("text_encoder", "text_encoder_2")


def require_family(source: str | Path, *, sdxl: bool) -> None:
    """Refuse a local model of another family, told from its directory or configs; hub names are not looked at.

    Raises:
        UserError: it is one, or no supported model.
    """
    if not Path(source).exists():
        return
    kind = describe_source(Path(source)).kind
    if (kind == "sdxl") != sdxl:
        remedy = "leave out --sdxl" if sdxl else "add --sdxl"
        raise UserError(f"{source} is a model of {KIND_NAMES[kind]}", remedy)


def load_sdxl_text_encoders(
    source: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> list[nn.Module]:
    """The two text encoders of an SDXL model: a file, a diffusers folder or a hub id.

    Raises:
        UserError: not there, or another model.
    """
    if Path(source).is_file():
        path = Path(source).resolve()
        parts, checkpoint = sdxl_loading.file_parts(path, dtype, latent_scale=1.0, with_vae=False)
        chosen = [parts[name] for name in SDXL_ENCODERS]
        fill(checkpoint, chosen, device=device)
    else:
        folder = resolve_folder(source, parts=(*SDXL_ENCODERS, "tokenizer", "tokenizer_2"), what="model")
        refuse_no_model_folder(folder)
        chosen = []
        for name in SDXL_ENCODERS:
            config, checkpoint = open_part(folder / name)
            chosen.append(sdxl_loading.folder_part(name, checkpoint, config, dtype))
            fill(checkpoint, [chosen[-1]], device=device)
    encoders = [part.module for part in chosen]
    for encoder in encoders:
        restore_buffers(encoder, device)
        encoder.requires_grad_(False).eval()
    return encoders
