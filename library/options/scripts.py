"""Which script has which options: one entry a script.

A concern is a dataclass of `library/options/`; an entry names its concerns in the order of `--help`, the options
that the script lacks, and those whose default, choices or type differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.messages import UserError
from library.options.bucket_tool import BucketToolConfig
from library.options.caching import CachingConfig
from library.options.config_file import ConfigFileConfig
from library.options.console import ConsoleConfig
from library.options.data_inspect import DataInspectConfig
from library.options.data_tools import EdgesConfig, FacesConfig, PictureResizeConfig, TextCleanConfig, TextMergeConfig
from library.options.dataset import DatasetConfig
from library.options.declare import Option, options_of
from library.options.distributed import DistributedConfig
from library.options.ema import EmaConfig
from library.options.embedding import EmbeddingConfig
from library.options.hub import HubConfig
from library.options.image import ImageConfig
from library.options.image_model import ImageModelConfig
from library.options.image_passes import ImagePassesConfig
from library.options.image_sizes import ImageSizesConfig
from library.options.logging import LoggingConfig
from library.options.loop import LoopConfig
from library.options.metadata import MetadataConfig
from library.options.minimal import MinimalConfig
from library.options.model import ModelConfig
from library.options.model_tools import ModelConvertConfig, ModelInspectConfig, ModelMergeConfig, ModelMetadataConfig
from library.options.model_training import ModelTrainingConfig
from library.options.network import NetworkConfig
from library.options.network_convert import NetworkConvertConfig
from library.options.network_tools import (
    NetworkCheckConfig,
    NetworkDemoConfig,
    NetworkExtractConfig,
    NetworkInterrogateConfig,
    NetworkMergeConfig,
    NetworkResizeConfig,
    NetworkSplitConfig,
)
from library.options.objective import ObjectiveConfig
from library.options.optimizer import OptimizerConfig
from library.options.precision import PrecisionConfig
from library.options.registries import nearest
from library.options.run_report import RunReportConfig
from library.options.samples import SamplesConfig
from library.options.saving import SavingConfig
from library.options.sdxl import SdxlConfig
from library.options.validation import ValidationConfig

CONCERNS: dict[str, type] = {
    "config_file": ConfigFileConfig,
    "model": ModelConfig,
    "network": NetworkConfig,
    "sdxl": SdxlConfig,
    "model_training": ModelTrainingConfig,
    "embedding": EmbeddingConfig,
    "dataset": DatasetConfig,
    "caching": CachingConfig,
    "bucket_tool": BucketToolConfig,
    "loop": LoopConfig,
    "optimizer": OptimizerConfig,
    "objective": ObjectiveConfig,
    "precision": PrecisionConfig,
    "saving": SavingConfig,
    "metadata": MetadataConfig,
    "samples": SamplesConfig,
    "validation": ValidationConfig,
    "ema": EmaConfig,
    "logging": LoggingConfig,
    "console": ConsoleConfig,
    "hub": HubConfig,
    "distributed": DistributedConfig,
    "network_merge": NetworkMergeConfig,
    "network_extract": NetworkExtractConfig,
    "network_resize": NetworkResizeConfig,
    "network_split": NetworkSplitConfig,
    "network_check": NetworkCheckConfig,
    "network_interrogate": NetworkInterrogateConfig,
    "network_demo": NetworkDemoConfig,
    "model_convert": ModelConvertConfig,
    "model_inspect": ModelInspectConfig,
    "model_merge": ModelMergeConfig,
    "model_metadata": ModelMetadataConfig,
    "run_report": RunReportConfig,
    "text_merge": TextMergeConfig,
    "text_clean": TextCleanConfig,
    "picture_resize": PictureResizeConfig,
    "edges": EdgesConfig,
    "faces": FacesConfig,
    "image": ImageConfig,
    "image_model": ImageModelConfig,
    "image_passes": ImagePassesConfig,
    "image_sizes": ImageSizesConfig,
    "minimal": MinimalConfig,
    "network_convert": NetworkConvertConfig,
    "data_inspect": DataInspectConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One script's command line.

    Attributes:
        summary: first line of `--help`.
        concerns: keys of `CONCERNS`, in the order of `--help` and of written config files.
        absent: options of these concerns that the script lacks.
        changed: option -> fields of its `Option` that differ in this script.
        required: options that command line and config file together must give.
        family: of the models that the script works on.
    """

    summary: str
    concerns: tuple[str, ...]
    absent: frozenset[str] = frozenset()
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    family: str = "sd"

    def groups(self) -> list[tuple[str, list[Option]]]:
        """(concern, its options in this script) in order."""
        return [(concern, self._options(concern)) for concern in self.concerns]

    def options(self) -> list[Option]:
        """All options in order."""
        return [option for _, options in self.groups() for option in options]

    def _options(self, concern: str) -> list[Option]:
        present = [o for o in options_of(CONCERNS[concern]) if o.dest not in self.absent]
        return [dataclasses.replace(o, **self.changed.get(o.dest, {})) for o in present]


_TRAINING = (
    "config_file",
    "model",
    "dataset",
    "saving",
    "metadata",
    "precision",
    "loop",
    "optimizer",
    "objective",
    "samples",
    "validation",
    "ema",
    "logging",
    "console",
    "hub",
    "distributed",
)
_MODEL_NEEDS = ("pretrained_model_name_or_path", "output_dir")
_OF_SDXL_MODELS = ("learning_rate_te1", "learning_rate_te2", "block_lr", "fused_optimizer_groups")
_MODEL_FORMATS: dict[str, dict[str, Any]] = {
    "save_model_as": {
        "default": None,
        "choices": (None, "ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        "help": "form of the written model: one file, or a diffusers folder; that of the source when left out",
    }
}
_EMBEDDING_NEEDS = (*_MODEL_NEEDS, "token_string")
_NOT_OF_EMBEDDINGS = frozenset(
    {
        *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
        *("weighted_captions", "fp8_base_unet"),
    }
)
_EMBEDDING_FORMATS: dict[str, dict[str, Any]] = {"save_model_as": {"default": "pt"}}
# Tools show messages as they come.
_NO_CONSOLE = ("console_log_level", "console_log_file", "console_log_simple")
_BY_SVD = ("new_rank", "new_conv_rank", "device", "lbws")


def _tool(summary: str, concern: str, required: tuple[str, ...], absent: tuple[str, ...] = ()) -> Script:
    return Script(
        summary=summary,
        concerns=(concern, "console"),
        absent=frozenset((*_NO_CONSOLE, *absent)),
        required=required,
    )


_CACHING = (
    *("config_file", "model", "dataset", "caching", "sdxl", "saving", "metadata", "precision", "loop", "objective"),
    *("samples", "logging", "console", "hub", "distributed"),
)
# Of these concerns, what the frozen command lines of the caching tools lack.
_NOT_CACHING = frozenset(
    {
        *("scale_v_pred_loss_like_noise_pred", "min_snr_gamma", "debiased_estimation_loss", "v_pred_like_loss"),
        *("initial_step", "initial_epoch", "skip_until_initial_step", "dry_run", "no_report", "save_model_as"),
        *("cpu_offload_checkpointing", "gradient_checkpointing_interval", "fp8_base_unet"),
        *("validation_split", "validation_seed"),
        *("deepspeed", "zero_stage", "zero3_init_flag", "zero3_save_16bit_model", "offload_optimizer_device"),
        *("offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path"),
        "fp16_master_weights_and_gradients",
    }
)

CACHE_TOOLS: dict[str, Script] = {
    "finetune/prepare_buckets_latents.py": _tool(
        "Choose training sizes for the pictures of a metadata file, and encode the pictures.",
        "bucket_tool",
        ("train_data_dir", "in_json", "out_json", "model_name_or_path"),
    ),
    "tools/cache_latents.py": Script(
        summary="Encode the pictures of data sets before a training; the latents go into files beside the pictures.",
        concerns=_CACHING,
        absent=_NOT_CACHING | {"weighted_captions"},
    ),
    "tools/cache_text_encoder_outputs.py": Script(
        summary="Encode the captions of data sets before an SDXL training, into files beside the pictures.",
        concerns=_CACHING,
        absent=_NOT_CACHING | {"no_half_vae"},
        required=("sdxl",),
        family="sdxl",
    ),
}

NETWORK_TOOLS: dict[str, Script] = {
    "networks/check_lora_weights.py": _tool("List the tensors of a LoRA file.", "network_check", ("file",)),
    "networks/extract_lora_from_dylora.py": _tool(
        "Cut a DyLoRA file into LoRA files of lower ranks.", "network_split", ("model", "unit", "save_to")
    ),
    "networks/extract_lora_from_models.py": _tool(
        "Extract a LoRA file from the difference of two models.",
        "network_extract",
        ("model_org", "model_tuned", "save_to"),
    ),
    "networks/lora_diffusers.py": _tool(
        "Draw pictures of a diffusers pipeline with and without a LoRA file.",
        "network_demo",
        ("model_id", "lora_weights"),
    ),
    "networks/lora_interrogator.py": _tool(
        "Show the tokens on which a LoRA file has the largest effect.", "network_interrogate", ("sd_model", "model")
    ),
    "networks/merge_lora.py": _tool(
        "Merge LoRA files with each other or into an SD 1.x or 2.x model.",
        "network_merge",
        ("models", "ratios", "save_to"),
        _BY_SVD,
    ),
    "networks/merge_lora_old.py": _tool(
        "Merge LoRA files as the first releases did: linear layers and 1x1 convolutions only.",
        "network_merge",
        ("models", "ratios", "save_to"),
        (*_BY_SVD, "no_metadata", "concat", "shuffle"),
    ),
    "networks/resize_lora.py": _tool("Change the rank of a LoRA file.", "network_resize", ("model", "save_to")),
    "networks/sdxl_merge_lora.py": _tool(
        "Merge LoRA files with each other or, like OFT files, into an SDXL model.",
        "network_merge",
        ("models", "ratios", "save_to"),
        (*(name for name in _BY_SVD if name != "lbws"), "v2"),
    ),
    "networks/svd_merge_lora.py": _tool(
        "Merge LoRA files of any ranks by the sum of their updates.",
        "network_merge",
        ("models", "ratios", "save_to"),
        ("v2", "sd_model", "concat", "shuffle"),
    ),
}

MODEL_TOOLS: dict[str, Script] = {
    "tools/convert_diffusers20_original_sd.py": _tool(
        "Convert a model between one file in Stability layout and a diffusers folder.",
        "model_convert",
        ("model_to_load", "model_to_save"),
    ),
    "tools/inspect_model.py": _tool("Say what a model or network file is.", "model_inspect", ("model",)),
    "tools/merge_models.py": _tool(
        "Merge models of one family by a weighted sum.", "model_merge", ("models", "output")
    ),
    "tools/report_run.py": _tool("Make the page about a training from its record.", "run_report", ("folder",)),
    "tools/show_metadata.py": _tool("Show the metadata of a safetensors file.", "model_metadata", ("model",)),
}

DATA_TOOLS: dict[str, Script] = {
    "finetune/merge_captions_to_metadata.py": _tool(
        "Collect caption files in a metadata file.", "text_merge", ("train_data_dir", "out_json")
    ),
    "finetune/merge_dd_tags_to_metadata.py": dataclasses.replace(
        _tool(
            "Collect tag files in a metadata file.",
            "text_merge",
            ("train_data_dir", "out_json"),
            ("caption_extention",),
        ),
        changed={"caption_extension": {"default": ".txt"}},
    ),
    "finetune/clean_captions_and_tags.py": _tool(
        "Clean captions and tags of a metadata file.", "text_clean", ("in_json", "out_json")
    ),
    "tools/resize_images_to_resolution.py": _tool(
        "Make smaller copies of a folder's pictures.", "picture_resize", ("src_img_folder", "dst_img_folder")
    ),
    "tools/canny.py": _tool("Draw the edges of a picture.", "edges", ("input", "output")),
    "tools/detect_face_rotate.py": _tool(
        "Find faces in pictures, turn them upright and cut them out.", "faces", ("src_dir", "dst_dir")
    ),
}

SCRIPTS: dict[str, Script] = {
    **NETWORK_TOOLS,
    **MODEL_TOOLS,
    **CACHE_TOOLS,
    **DATA_TOOLS,
    "train_network.py": Script(
        summary="Train a network (LoRA and its relatives) on a Stable Diffusion 1.x or 2.x model.",
        concerns=(*_TRAINING, "network"),
        required=("pretrained_model_name_or_path", "network_module", "output_dir"),
    ),
    "sdxl_train_network.py": Script(
        summary="Train a network (LoRA and its relatives) on an SDXL model.",
        concerns=(*_TRAINING, "network", "sdxl"),
        required=("pretrained_model_name_or_path", "network_module", "output_dir"),
        family="sdxl",
    ),
    "train_db.py": Script(
        summary="Train a Stable Diffusion 1.x or 2.x model on pictures of a subject (DreamBooth).",
        concerns=(*_TRAINING, "model_training"),
        absent=frozenset({*_OF_SDXL_MODELS, "fp8_base_unet", "in_json", "dataset_repeats", "train_text_encoder"})
        | {"diffusers_xformers"},
        changed=_MODEL_FORMATS,
        required=_MODEL_NEEDS,
    ),
    "fine_tune.py": Script(
        summary="Train a Stable Diffusion 1.x or 2.x model on pictures of a metadata file.",
        concerns=(*_TRAINING, "model_training"),
        absent=frozenset({*_OF_SDXL_MODELS, "fp8_base_unet", "reg_data_dir", "prior_loss_weight"})
        | {"no_token_padding", "stop_text_encoder_training"},
        changed=_MODEL_FORMATS,
        required=_MODEL_NEEDS,
    ),
    "sdxl_train.py": Script(
        summary="Train an SDXL model.",
        concerns=(*_TRAINING, "model_training", "sdxl"),
        absent=frozenset({"fp8_base_unet", "no_token_padding", "stop_text_encoder_training", "learning_rate_te"}),
        changed=_MODEL_FORMATS,
        required=_MODEL_NEEDS,
        family="sdxl",
    ),
    "train_textual_inversion.py": Script(
        summary="Teach the text encoder of a Stable Diffusion 1.x or 2.x model a new word (textual inversion).",
        concerns=(*_TRAINING, "embedding"),
        absent=_NOT_OF_EMBEDDINGS,
        changed=_EMBEDDING_FORMATS,
        required=_EMBEDDING_NEEDS,
    ),
    "train_textual_inversion_XTI.py": Script(
        summary="Teach a Stable Diffusion 1.x or 2.x model a new word with vectors for each layer (XTI).",
        concerns=(*_TRAINING, "embedding"),
        absent=_NOT_OF_EMBEDDINGS,
        changed=_EMBEDDING_FORMATS,
        required=_EMBEDDING_NEEDS,
    ),
    "sdxl_train_textual_inversion.py": Script(
        summary="Teach both text encoders of an SDXL model a new word (textual inversion).",
        concerns=(*_TRAINING, "embedding", "sdxl"),
        absent=_NOT_OF_EMBEDDINGS | {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"},
        changed=_EMBEDDING_FORMATS,
        required=_EMBEDDING_NEEDS,
        family="sdxl",
    ),
    "gen_img_diffusers.py": Script(
        summary="Draw pictures with a Stable Diffusion 1.x or 2.x model.",
        concerns=("image_model", "image", "image_passes", "console"),
        absent=frozenset(
            {"no_half_vae", "control_net_lllite_models", "control_net_multipliers", "clip_vision_strength"}
        ),
        required=("ckpt",),
    ),
    "sdxl_gen_img.py": Script(
        summary="Draw pictures with an SDXL model.",
        concerns=("image_model", "image", "image_sizes", "image_passes", "console"),
        absent=frozenset(
            {
                *("v2", "v_parameterization", "shuffle_prompts", "XTI_embeddings"),
                *("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale", "vgg16_guidance_layer"),
                *("control_net_models", "control_net_preps", "control_net_weights"),
            }
        ),
        changed={
            "W": {"help": "width in pixels, a multiple of 32; 1024 when left out"},
            "H": {"help": "height in pixels, a multiple of 32; 1024 when left out"},
            "clip_skip": {"help": "no effect: SDXL always takes the layer before the last"},
        },
        required=("ckpt",),
        family="sdxl",
    ),
    "sdxl_minimal_inference.py": Script(
        summary="Draw one picture of 1024x1024 pixels with an SDXL model.",
        concerns=("minimal", "console"),
        absent=frozenset({"console_log_level", "console_log_file", "console_log_simple"}),
        required=("ckpt_path",),
        family="sdxl",
    ),
    "networks/convert_lora.py": Script(
        summary="Convert a LoRA file between the names of this program, of diffusers and of peft.",
        concerns=("network_convert", "console"),
        absent=frozenset({"console_log_level", "console_log_file", "console_log_simple"}),
        required=("model", "save_to"),
    ),
}


def _reporter() -> Script:
    """Takes what any training script takes, so that a training's own command line or TOML file can be given."""
    trainings = [script for script in SCRIPTS.values() if {"dataset", "optimizer"} <= {*script.concerns}]
    concerns = dict.fromkeys(concern for script in trainings for concern in script.concerns)
    return Script(
        summary="Say what a training would make of its pictures and captions, and write a page about them.",
        concerns=("data_inspect", *concerns),
    )


SCRIPTS["tools/inspect_dataset.py"] = _reporter()


def find_script(name: str) -> Script:
    """The entry of a script, by its path from the top folder.

    Raises:
        UserError: no such script.
    """
    if name not in SCRIPTS:
        near = nearest(name, SCRIPTS)
        raise UserError(f"no script {name}", f"did you mean {near[0]}?" if near else f"known: {', '.join(SCRIPTS)}")
    return SCRIPTS[name]
