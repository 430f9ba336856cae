"""What the tools on network files take: `networks/*.py`."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option

_PRECISIONS = (None, "float", "fp16", "bf16")
_SAVE_TO = "file to write; .safetensors with metadata, any other suffix a torch pickle"
_SAVED = "number format of the file; that of the computation when left out"
_DEVICE = "device that computes, e.g. cuda or cpu; the best one here when left out"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkMergeConfig:
    """Networks that are merged with each other or into a model."""

    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    save_precision: str | None = option(None, _SAVED, choices=_PRECISIONS)
    precision: str = option("float", "number format in which weights are added up", choices=("float", "fp16", "bf16"))
    sd_model: str | None = option(
        None, "model that the networks are merged into: a file or diffusers folder; without it they become one network"
    )
    save_to: str | None = option(None, _SAVE_TO)
    models: list[str] | None = option(None, "network files")
    ratios: list[float] | None = option(None, "strength of each of --models")
    new_rank: int = option(4, "rank of the new network")
    new_conv_rank: int | None = option(None, "rank of its convolutions other than 1x1; --new_rank when left out")
    device: str | None = option(None, _DEVICE)
    no_metadata: bool = option(False, "leave the modelspec texts out of the file")
    concat: bool = option(False, "set the networks side by side, so that ranks add up and may differ")
    shuffle: bool = option(False, "put the ranks of each module in a random order")
    lbws: list[str] | None = option(
        None, "strength of each block, one JSON list of 12, 17, 20 or 26 numbers for each of --models"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkExtractConfig:
    """Two models whose difference becomes a network."""

    v2: bool = option(False, "the models are Stable Diffusion 2.x")
    v_parameterization: bool | None = option(
        None, "any text: the models predict velocity; like --v2 when left out", type=bool
    )
    sdxl: bool = option(False, "the models are SDXL")
    save_precision: str | None = option(None, "number format of the file; float when left out", choices=_PRECISIONS)
    model_org: str | None = option(None, "original model: a file or a diffusers folder")
    model_tuned: str | None = option(None, "tuned model: the network is what it has over the original")
    save_to: str | None = option(None, _SAVE_TO)
    dim: int = option(4, "rank of the network")
    conv_dim: int | None = option(None, "rank of convolutions other than 1x1; without it these are left out")
    device: str | None = option(None, _DEVICE)
    no_metadata: bool = option(False, "leave the modelspec texts out of the file")
    load_precision: str | None = option(
        None, "number format in which the models are held; float when left out", choices=_PRECISIONS
    )
    clamp_quantile: float = option(0.99, "values beyond this quantile are cut down to it; 1 = none")
    min_diff: float = option(
        0.01, "a text encoder whose weights nowhere differ by more than this gets no modules in the network"
    )
    load_original_model_to: str | None = option(None, "device that holds the original model; cpu when left out")
    load_tuned_model_to: str | None = option(None, "device that holds the tuned model; cpu when left out")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkResizeConfig:
    """A network whose rank changes."""

    save_precision: str | None = option(None, "number format of the file; float when left out", choices=_PRECISIONS)
    new_rank: int = option(4, "new rank; with --dynamic_method the largest one")
    new_conv_rank: int | None = option(None, "the same for convolutions; --new_rank when left out")
    save_to: str | None = option(None, "file to write; .safetensors, .ckpt, .pt or .pth")
    model: str | None = option(None, "network file to resize")
    device: str | None = option(None, _DEVICE)
    verbose: bool = option(False, "show what each module keeps")
    dynamic_method: str | None = option(
        None,
        "choose each module's rank by its singular values: by ratio to the largest, by the share of the Frobenius norm"
        " or by the share of their sum that is kept",
        choices=(None, "sv_ratio", "sv_fro", "sv_cumulative"),
    )
    dynamic_param: float | None = option(None, "the ratio (above 1) or share (0 to 1) for --dynamic_method")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSplitConfig:
    """A DyLoRA file that is cut into files of one rank each."""

    unit: int | None = option(None, "step between the ranks of the files")
    save_to: str | None = option(
        None, "files to write; each gets its rank before the suffix, like name-0004.safetensors"
    )
    model: str | None = option(None, "DyLoRA file")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkCheckConfig:
    """A network file to look at."""

    file: str = option("", "network file", flag="file")
    show_all_keys: bool = option(False, "show all tensors, not only lora_up and lora_down", short="-s")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkInterrogateConfig:
    """A network whose effect on each token is measured."""

    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    sd_model: str | None = option(None, "model: a file or a diffusers folder")
    model: str | None = option(None, "network file")
    batch_size: int = option(16, "tokens per call of the text encoder")
    clip_skip: int | None = option(None, "take the text encoder's output N layers from its end")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkDemoConfig:
    """Pictures of a diffusers pipeline with and without a network."""

    model_id: str | None = option(None, "model: a diffusers folder or a Hugging Face name")
    lora_weights: str | None = option(None, "network file")
    sdxl: bool = option(False, "the model is SDXL")
    prompt: str = option("A photo of cat", "what the pictures show")
    negative_prompt: str = option("", "what they do not show")
    seed: int = option(0, "seed of the pictures")
