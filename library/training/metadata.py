"""Metadata of network files: what was trained on what, as texts in the file's header.

Every value is `str()` of a Python value, because readers of these files know the texts of the original.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.config import parse_face_range
from library.models.hashes import file_hashes
from library.models.modelspec import metadata_of_run
from library.options.declare import from_namespace
from library.options.metadata import MetadataConfig
from library.training.data_metadata import (
    base_name,
    common_resolution,
    config_file_metadata,
    facts_of,
    manifest_metadata,
    single_dataset_metadata,
)

if TYPE_CHECKING:
    from library.options.parser import Resolved

SS_METADATA_KEY_V2 = "ss_v2"
SS_METADATA_KEY_BASE_MODEL_VERSION = "ss_base_model_version"
SS_METADATA_KEY_NETWORK_MODULE = "ss_network_module"
SS_METADATA_KEY_NETWORK_DIM = "ss_network_dim"
SS_METADATA_KEY_NETWORK_ALPHA = "ss_network_alpha"
SS_METADATA_KEY_NETWORK_ARGS = "ss_network_args"
SS_METADATA_MINIMUM_KEYS = [
    SS_METADATA_KEY_V2,
    SS_METADATA_KEY_BASE_MODEL_VERSION,
    SS_METADATA_KEY_NETWORK_MODULE,
    SS_METADATA_KEY_NETWORK_DIM,
    SS_METADATA_KEY_NETWORK_ALPHA,
    SS_METADATA_KEY_NETWORK_ARGS,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What no option says.

    Attributes:
        session_id: drawn at the start, 0 to 2^32.
        started_at: seconds since 1970.
        seed: of the run, drawn if none was given.
        base_model_version: `sd_v1`, `sd_v2_v`, ...
        optimizer: name of the class; optimizer_args: its arguments as `key=value,...`.
        processes: of the run.
        batches_per_epoch: of this process.
        epochs, max_train_steps: length of the run.
        scale_weight_norms: limit in use; None without, False when the module has no such function.
        network_args: what the network was made with, or None without `--network_args`.
        num_validation_images: held-out pictures.
    """

    session_id: int
    started_at: float
    seed: int
    base_model_version: str
    optimizer: str
    optimizer_args: str = ""
    processes: int = 1
    batches_per_epoch: int
    epochs: int
    max_train_steps: int
    scale_weight_norms: float | bool | None = None
    network_args: Mapping[str, Any] | None = None
    num_validation_images: int = 0


def network_metadata(options: Resolved, facts: RunFacts, datasets: Sequence[Any]) -> dict[str, str]:
    """The `ss_*` texts of a network file that stay the same in a run.

    Args:
        options: the effective options (rates and schedule as the optimizer left them).
        facts: of the run.
        datasets: the members of the run's data set group.

    Returns:
        Key -> text; `progress_metadata` and ModelSpec come on top when a file is written.
    """
    values: dict[str, Any] = {
        **_run_values(options, facts),
        "ss_num_train_images": sum(dataset.num_train_images for dataset in datasets),
        "ss_num_reg_images": sum(dataset.num_reg_images for dataset in datasets),
        **_network_values(options, facts),
        **_model_values(options, facts),
        **_objective_values(options),
        **_precision_values(options),
        **_caption_values(options),
        **_validation_values(options, facts),
    }
    described = [facts_of(dataset) for dataset in datasets]
    if options.dataset.dataset_config is not None:
        values |= config_file_metadata(described)
    else:
        values |= single_dataset_metadata(options, facts.processes, described[0])
    values |= manifest_metadata(datasets)
    values |= _base_files(options)
    return {key: str(value) for key, value in values.items()}


def progress_metadata(epoch: int, step: int, finished_at: float | None = None) -> dict[str, str]:
    """What changes from file to file: epoch, update and time.

    Args:
        epoch: its number after an epoch and at the end; its zero-based index after a step.
    """
    finished = time.time() if finished_at is None else finished_at
    return {"ss_epoch": str(epoch), "ss_steps": str(step), "ss_training_finished_at": str(finished)}


def minimum_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `--no_metadata` leaves: the keys without which a network cannot be loaded."""
    return {key: metadata[key] for key in SS_METADATA_MINIMUM_KEYS if key in metadata}


def build_minimum_network_metadata(
    v2: Any, base_model: Any, network_module: Any, network_dim: Any, network_alpha: Any, network_args: Any
) -> dict[str, str]:
    """The same from the values themselves, for tools that write network files; None leaves a key out."""
    values = (v2, base_model, network_module, network_dim, network_alpha, None)
    result = {k: str(v) for k, v in zip(SS_METADATA_MINIMUM_KEYS, values, strict=True) if v is not None}
    if network_args is not None:
        result[SS_METADATA_KEY_NETWORK_ARGS] = json.dumps(network_args)
    return result


def modelspec_for_network(
    args: Any, *, is_sdxl: bool, resolution: tuple[int, int] | None = None, timestamp: float | None = None
) -> dict[str, str]:
    """The `modelspec.*` texts of a network file.

    Args:
        args: namespace of the script.
        resolution: of the data sets where they agree; used when `--resolution` is not given.
        timestamp: seconds since 1970; now when left out.
    """
    return metadata_of_run(
        from_namespace(MetadataConfig, args),
        kind="lora",
        v2=bool(getattr(args, "v2", False)),
        v_parameterization=bool(getattr(args, "v_parameterization", False)),
        sdxl=is_sdxl,
        timestamp=time.time() if timestamp is None else timestamp,
        output_name=getattr(args, "output_name", None),
        resolution=getattr(args, "resolution", None) or resolution,
        min_timestep=getattr(args, "min_timestep", None),
        max_timestep=getattr(args, "max_timestep", None),
        clip_skip=getattr(args, "clip_skip", None),
    )


def modelspec_for_run(
    options: Resolved, datasets: Sequence[Any], *, kind: str, sdxl: bool, is_stability_layout: bool | None = None
) -> dict[str, str]:
    """The `modelspec.*` texts of a model or an embedding.

    Args:
        options: the effective options.
        datasets: the members of the run's data set group, for the resolution where `--resolution` is not given.
        kind, sdxl, is_stability_layout: as for `metadata_of_run`.
    """
    return metadata_of_run(
        options.metadata,
        kind=kind,
        v2=options.model.v2,
        v_parameterization=options.model.v_parameterization,
        sdxl=sdxl,
        timestamp=time.time(),
        output_name=options.saving.output_name,
        resolution=options.dataset.resolution or common_resolution(datasets),
        min_timestep=options.objective.min_timestep,
        max_timestep=options.objective.max_timestep,
        clip_skip=options.model.clip_skip,
        is_stability_layout=is_stability_layout,
    )


def git_revision() -> str:
    """Commit of this program, `(unknown)` outside a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"
    return result.stdout.strip() if result.returncode == 0 else "(unknown)"


def _run_values(options: Resolved, facts: RunFacts) -> dict[str, Any]:
    optimizer = options.optimizer
    arguments = f"({facts.optimizer_args})" if facts.optimizer_args else ""
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": options.saving.output_name,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_text_encoder_lr": options.network.text_encoder_lr,
        "ss_unet_lr": options.network.unet_lr,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_gradient_accumulation_steps": options.loop.gradient_accumulation_steps,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_lr_warmup_steps": optimizer.lr_warmup_steps,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer + arguments,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_training_comment": options.network.training_comment,
        "ss_sd_scripts_commit_hash": git_revision(),
    }


def _network_values(options: Resolved, facts: RunFacts) -> dict[str, Any]:
    network = options.network
    values = {
        SS_METADATA_KEY_NETWORK_MODULE: network.network_module,
        SS_METADATA_KEY_NETWORK_DIM: network.network_dim,
        SS_METADATA_KEY_NETWORK_ALPHA: network.network_alpha,
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": facts.scale_weight_norms,
    }
    if facts.network_args is not None:
        values[SS_METADATA_KEY_NETWORK_ARGS] = json.dumps(dict(facts.network_args))
    return values


def _model_values(options: Resolved, facts: RunFacts) -> dict[str, Any]:
    model = options.model
    return {
        SS_METADATA_KEY_V2: model.v2,
        SS_METADATA_KEY_BASE_MODEL_VERSION: facts.base_model_version,
        "ss_clip_skip": model.clip_skip,
        "ss_max_token_length": model.max_token_length,
    }


def _objective_values(options: Resolved) -> dict[str, Any]:
    names = (
        "zero_terminal_snr noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale "
        "ip_noise_gamma min_snr_gamma noise_offset_random_strength ip_noise_gamma_random_strength "
        "loss_type huber_schedule huber_scale huber_c"
    )
    values = {f"ss_{name}": getattr(options.objective, name) for name in names.split()}
    return {**values, "ss_debiased_estimation": options.objective.debiased_estimation_loss}


def _precision_values(options: Resolved) -> dict[str, Any]:
    names = ["mixed_precision", "full_fp16", "gradient_checkpointing", "lowram", "fp8_base", "fp8_base_unet"]
    return {f"ss_{name}": getattr(options.precision, name) for name in names}


def _caption_values(options: Resolved) -> dict[str, Any]:
    dataset = options.dataset
    names = (
        "cache_latents caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate "
        "prior_loss_weight resize_interpolation"
    )
    values = {f"ss_{name}": getattr(dataset, name) for name in names.split()}
    values["ss_cache_latents"] = dataset.cache_latents or dataset.cache_latents_to_disk
    values["ss_face_crop_aug_range"] = parse_face_range(dataset.face_crop_aug_range)
    return values


def _validation_values(options: Resolved, facts: RunFacts) -> dict[str, Any]:
    names = ["max_validation_steps", "validate_every_n_epochs", "validate_every_n_steps"]
    values = {f"ss_{name}": options.value(name) for name in names}
    return {
        **values,
        "ss_num_validation_images": facts.num_validation_images,
        "ss_validation_seed": options.dataset.validation_seed,
        "ss_validation_split": options.dataset.validation_split,
    }


def _base_files(options: Resolved) -> dict[str, str]:
    """Names and hashes of the base model and of the VAE that replaces its own."""
    files = {"sd_model": options.model.pretrained_model_name_or_path, "vae": options.model.vae}
    values = {}
    for key, path in files.items():
        if not path:
            continue
        if os.path.exists(path):
            legacy, whole = file_hashes(path)
            values |= {f"ss_{key}_hash": legacy, f"ss_new_{key}_hash": whole}
        values[f"ss_{key}_name"] = base_name(path) if os.path.exists(path) else path
    return values
