"""Models, networks and memory of the picture scripts."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageModelConfig:
    """Models, networks and memory of the picture scripts."""

    ckpt: str | None = option(None, "model: a checkpoint file, a diffusers folder or a Hugging Face name")
    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts velocity (SD 2.x 768 and other v models)")
    vae: str | None = option(
        None, "VAE that replaces the model's own: a file, a diffusers folder or a Hugging Face name"
    )
    tokenizer_cache_dir: str | None = option(
        None, "folder that holds tokenizers, used instead of the shipped vocabulary"
    )
    clip_skip: int | None = option(None, "take the text encoder's output N layers from its end (1 = last; SD 1.x only)")
    fp16: bool = option(False, "compute in float16; wins over --bf16")
    bf16: bool = option(False, "compute in bfloat16")
    xformers: bool = option(False, "attention by the xformers package")
    sdpa: bool = option(False, "attention by torch's own scaled_dot_product_attention, which is the default")
    diffusers_xformers: bool = option(False, "old form of --xformers")
    opt_channels_last: bool = option(False, "lay tensors out with channels last")
    vae_batch_size: float | None = option(
        None, "pictures per call of the VAE: a number, or a share of --batch_size below 1"
    )
    no_half_vae: bool = option(False, "keep the VAE in float32 with --fp16 and --bf16")
    vae_slices: int | None = option(None, "slices in which the VAE decodes one picture, for less memory")
    network_module: list[str] | None = option(
        None, "modules of the networks, e.g. networks.lora; one per --network_weights"
    )
    network_weights: list[str] | None = option(None, "network files")
    network_mul: list[float] | None = option(None, "multipliers of the networks; 1.0 where the list is shorter")
    network_args: list[str] | None = option(None, "arguments of each network as KEY=VALUE, several joined with ;")
    network_show_meta: bool = option(False, "show the metadata of the network files")
    network_merge: bool = option(False, "merge the networks into the model: faster, multipliers then fixed")
    network_merge_n_models: int | None = option(None, "merge only the first N networks")
    network_pre_calc: bool = option(
        False, "compute the networks' weights once and add them to the layers as prompts need them"
    )
    network_regional_mask_max_color_codes: int | None = option(
        None, "number of regions, each with its own network, in the mask picture"
    )
    textual_inversion_embeddings: list[str] | None = option(
        None, "embedding files; the file name is the word in prompts"
    )
    XTI_embeddings: list[str] | None = option(None, "embedding files with one vector per U-Net block")
