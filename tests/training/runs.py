"""Small trainings by every script, as a user starts them: options by script, and what a run leaves behind."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "reference" / "data" / "train"
STEPS = 4

EMBEDDING = ("--token_string", "zzz", "--init_word", "red", "--use_object_template", "--save_model_as", "safetensors")
# Script -> (family of its model, options that it needs beside the common ones).
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train_network.py": ("sd15", ("--network_module", "networks.lora", "--network_dim", "2")),
    "train_db.py": ("sd15", ("--save_model_as", "safetensors", "--learning_rate", "1e-5")),
    "train_textual_inversion.py": ("sd15", EMBEDDING),
    "train_textual_inversion_XTI.py": ("sd15", EMBEDDING),
    "sdxl_train_network.py": ("sdxl", ("--network_module", "networks.lora", "--network_dim", "2")),
    "sdxl_train.py": ("sdxl", ("--save_model_as", "safetensors", "--learning_rate", "1e-5", "--train_text_encoder")),
    "sdxl_train_textual_inversion.py": ("sdxl", EMBEDDING),
}


def options_of(script: str, model: Path, folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    """A whole command line; later options win."""
    return [
        *("--pretrained_model_name_or_path", str(model)),
        *("--train_data_dir", str(PICTURES), "--caption_extension", ".txt", "--resolution", "64,64"),
        # one size of 64x64: with maps one pixel wide, torch's bfloat16 convolutions on CPUs give wrong gradients
        *("--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "64", "--bucket_reso_steps", "64"),
        *("--train_batch_size", "2", "--seed", "1", "--max_data_loader_n_workers", "0", "--learning_rate", "1e-3"),
        *("--output_dir", str(folder), "--output_name", "x", "--max_train_steps", str(steps)),
        *SCRIPTS[script][1],
        *more,
    ]


def train(script: str, options: list[str]) -> None:
    """Run a script in this process."""
    from library.options.parser import parse

    args = parse(script, options)
    module = importlib.import_module(script.removesuffix(".py"))
    if hasattr(module, "train"):
        module.train(args)
        return
    trainer = next(name for name in dir(module) if name.endswith("Trainer"))
    getattr(module, trainer)().train(args)


def losses(folder: Path) -> list[float]:
    """Loss of each update, from the record of the run."""
    lines = [json.loads(line) for line in (folder / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]
