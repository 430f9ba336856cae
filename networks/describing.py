"""What a network file is: method, rank, targets, training, base model, and which programs load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from library.models.checkpoint import Checkpoint
from library.models.describing import number_formats
from networks import clients
from networks.files import kind_of
from networks.tool_files import find_pairs

# Metadata key -> how it is shown.
TRAINING = {
    "ss_output_name": "name",
    "ss_training_comment": "comment",
    "ss_num_train_images": "pictures",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "U-Net learning rate",
    "ss_text_encoder_lr": "text encoder learning rate",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_batch_size_per_device": "batch size",
    "ss_resolution": "resolution",
    "ss_mixed_precision": "number format",
    "ss_seed": "seed",
    "ss_network_args": "network arguments",
}
BASE = {
    "ss_base_model_version": "version",
    "ss_sd_model_name": "name",
    "ss_sd_model_hash": "short hash",
    "ss_new_sd_model_hash": "sha256",
}
_TARGETS = (
    (r"^(lora|oft|lycoris)_unet_|^unet\.|^base_model\.model\.", "U-Net"),
    (r"^lora_te1_|^text_encoder\.", "first text encoder"),
    (r"^lora_te2_|^text_encoder_2\.", "second text encoder"),
    (r"^lora_te_", "text encoder"),
)


def is_network(checkpoint: Checkpoint) -> bool:
    """Whether a file is of a kind that belongs to a network, not a model."""
    return clients.file_kind(checkpoint.tensors) is not clients.UNKNOWN


def describe_network(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts about a network file, read from its header and its alphas."""
    stubs = {key: torch.empty(info.shape, device="meta") for key, info in checkpoint.tensors.items()}
    metadata = checkpoint.metadata
    pairs = find_pairs(checkpoint.tensors)
    ranks = Counter(checkpoint.tensors[pair.down].shape[0] for pair in pairs.values())
    alphas = checkpoint.read([pair.alpha for pair in pairs.values() if pair.alpha in checkpoint.tensors])
    return {
        "path": str(checkpoint.path),
        "kind": "network",
        "method": clients.file_kind(checkpoint.tensors).name,
        "module": metadata.get("ss_network_module", ""),
        "for": kind_of(stubs),
        "rank": _counted(ranks) or metadata.get("ss_network_dim", ""),
        "alpha": _counted(Counter(float(alpha) for alpha in alphas.values())) or metadata.get("ss_network_alpha", ""),
        "targets": targets(checkpoint.tensors),
        "number_formats": number_formats([checkpoint]),
        "base_model": {name: metadata[key] for key, name in BASE.items() if metadata.get(key, "None") != "None"},
        "training": {name: metadata[key] for key, name in TRAINING.items() if metadata.get(key, "None") != "None"},
        "hash": metadata.get("sshs_model_hash", ""),
        "programs": clients.report(checkpoint.tensors),
    }


def targets(keys: Iterable[str]) -> dict[str, int]:
    """Part of the model -> its modules in the file."""
    modules: dict[str, set[str]] = {}
    for key in keys:
        part = next((name for pattern, name in _TARGETS if re.search(pattern, key)), "other")
        modules.setdefault(part, set()).add(re.sub(r"(\.processor)?\.[^.]*(lora|alpha|hada|lokr|oft|dora).*$", "", key))
    return {part: len(names) for part, names in modules.items()}


def _counted(values: Counter) -> str:
    """`8`, or `4 (32 modules), 8 (160 modules)`."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in sorted(values.items()))
