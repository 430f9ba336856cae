"""What `networks/convert_lora.py` takes."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option

FORMS = ("kohya", "kohya_stability_names", "kohya_diffusers_names", "diffusers", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConvertConfig:
    """A LoRA file whose names change."""

    model: str | None = option(None, "LoRA file in any of the forms, or a peft folder")
    save_to: str | None = option(None, "file to write, for peft a folder")
    to: str = option(
        "kohya",
        "form to write: kohya, the names of this program, ComfyUI and A1111, with U-Net names in the family's own style"
        " or in a given one; diffusers, one file for load_lora_weights; peft, one folder for each part of the model",
        choices=FORMS,
    )
