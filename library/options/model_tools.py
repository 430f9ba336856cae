"""What the tools on model files take: `tools/convert_diffusers20_original_sd.py`, `merge_models.py` and others."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option

_PRECISIONS = ("float", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConvertConfig:
    """A model that changes its layout or number format."""

    v1: bool = option(False, "the model is Stable Diffusion 1.x; seen from its tensors when left out")
    v2: bool = option(False, "the model is Stable Diffusion 2.x; seen from its tensors when left out")
    unet_use_linear_projection: bool = option(
        False, "no effect: diffusers folders of Stable Diffusion 2.x always get linear projections"
    )
    fp16: bool = option(False, "write float16")
    bf16: bool = option(False, "write bfloat16; --fp16 wins")
    float: bool = option(False, "write float32; --fp16 and --bf16 win")
    save_precision_as: str = option("no", "the same as --fp16, --bf16 or --float", choices=("fp16", "bf16", "float"))
    epoch: int = option(0, "added to the source's epoch in a .ckpt file")
    global_step: int = option(0, "added to the source's step in a .ckpt file")
    metadata: str | None = option(None, "texts for a .safetensors file, as a JSON object or a Python dictionary")
    variant: str | None = option(None, "which weights of a diffusers folder to read, e.g. fp16")
    reference_model: str | None = option(
        None, "diffusers folder that gives tokenizer and scheduler of the new folder; the source's own when left out"
    )
    use_safetensors: bool = option(False, "write a diffusers folder with .safetensors instead of .bin files")
    model_to_load: str = option("", "checkpoint file, diffusers folder or Hugging Face name", flag="model_to_load")
    model_to_save: str = option(
        "",
        "what to write: a file if it ends in .safetensors, .ckpt, .pt, .pth or .bin, else a diffusers folder",
        flag="model_to_save",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMergeConfig:
    """Models of one family that are added up."""

    models: list[str] | None = option(None, "safetensors files in Stability layout", nargs="+")
    output: str | None = option(None, "file to write; .safetensors is appended when it does not end so")
    ratios: list[float] | None = option(
        None, "weight of each of --models, negative ones too; equal shares when left out", nargs="+"
    )
    unet_only: bool = option(False, "merge the U-Net alone; the rest is the first model's")
    device: str = option("cpu", "device that computes, e.g. cuda or cpu")
    precision: str = option("float", "number format in which weights are added up", choices=_PRECISIONS)
    saving_precision: str = option("float", "number format of the file", choices=_PRECISIONS)
    show_skipped: bool = option(False, "list tensors that the first model lacks, which are left out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMetadataConfig:
    """A file whose metadata is shown."""

    model: str = option(None, "safetensors file", required=True)
    json: bool = option(False, "show one JSON object with the texts as they stand in the file, for programs")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInspectConfig:
    """A model or network that is described."""

    model: str = option("", "model file, diffusers folder or network file", flag="model")
    json: bool = option(False, "show one JSON object, for programs")
