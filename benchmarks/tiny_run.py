"""A LoRA run on the tiny random model and pictures of the tests, as a command line."""

from __future__ import annotations

import lzma
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"


def small_model() -> Path | None:
    """The shipped small model, where it is there."""
    folder = REFERENCE.parents[1] / "examples" / "quickstart" / "model"
    return folder if (folder / "model_index.json").exists() else None


def tiny_run(folder: Path, steps: int, model: Path | None = None) -> list[str]:
    """Options of `train_network.py` for `steps` updates; results, and a model where none is given, go into `folder`."""
    if model is None:
        model = folder / "tiny.safetensors"
        model.write_bytes(lzma.decompress((REFERENCE / "models" / "sd15.safetensors.xz").read_bytes()))
    return [
        *("--pretrained_model_name_or_path", str(model)),
        *("--train_data_dir", str(REFERENCE / "data" / "train"), "--caption_extension", ".txt"),
        *("--resolution", "96,96", "--train_batch_size", "2", "--cache_latents"),
        *("--network_module", "networks.lora", "--network_dim", "4", "--optimizer_type", "AdamW"),
        *("--learning_rate", "1e-4", "--seed", "1", "--max_data_loader_n_workers", "0"),
        *("--output_dir", str(folder / "out"), "--output_name", "x", "--max_train_steps", str(steps)),
    ]
