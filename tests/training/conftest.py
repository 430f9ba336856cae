"""Trainings of a few steps on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PICTURES = Path(__file__).parents[1] / "reference" / "data" / "train"


@pytest.fixture
def command(tiny_sd15: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Options of a small LoRA run; more can be given."""

    def build(*options: str, output: str = "out", steps: int = 4) -> list[str]:
        return [
            *("--pretrained_model_name_or_path", str(tiny_sd15)),
            *("--train_data_dir", str(PICTURES), "--caption_extension", ".txt"),
            *("--resolution", "96,96", "--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "256"),
            *("--bucket_reso_steps", "32", "--train_batch_size", "2"),
            *("--network_module", "networks.lora", "--network_dim", "2"),
            *("--learning_rate", "1e-3", "--seed", "1", "--max_data_loader_n_workers", "0"),
            *("--output_dir", str(tmp_path / output), "--output_name", "x"),
            *("--max_train_steps", str(steps)),
            *options,
        ]

    return build


@pytest.fixture
def train(command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Run a training in this process; returns its output folder."""

    def run(*options: str, output: str = "out", steps: int = 4, trainer: Any = None) -> Path:
        from library.options.parser import parse
        from library.training.network_trainer import NetworkTrainer

        args = parse("train_network.py", command(*options, output=output, steps=steps))
        (trainer or NetworkTrainer()).train(args)
        return tmp_path / output

    return run


@pytest.fixture
def train_sdxl(command: Callable[..., list[str]], tiny_sdxl: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same on the tiny SDXL model."""

    def run(*options: str, output: str = "out", steps: int = 4, trainer: Any = None) -> Path:
        from library.options.parser import parse
        from library.training.sdxl_network_trainer import SdxlNetworkTrainer

        model = ("--pretrained_model_name_or_path", str(tiny_sdxl))
        args = parse("sdxl_train_network.py", command(*model, *options, output=output, steps=steps))
        (trainer or SdxlNetworkTrainer()).train(args)
        return tmp_path / output

    return run


@pytest.fixture
def train_model(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run a training of a whole model by its script's function; returns its output folder."""

    def run(script: str, *options: str, output: str = "out", steps: int = 2, data: bool = True) -> Path:
        import importlib

        module = importlib.import_module(script)
        model = tiny_sdxl if script == "sdxl_train" else tiny_sd15
        pictures = PICTURES / "1_shape" if script == "fine_tune" else PICTURES
        sources = ["--train_data_dir", str(pictures), "--caption_extension", ".txt"]
        sources += ["--in_json", str(PICTURES.parent / "meta.json")] if script == "fine_tune" else []
        argv = [
            *("--pretrained_model_name_or_path", str(model)),
            *(sources if data else ()),
            *("--resolution", "96,96", "--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "256"),
            *("--bucket_reso_steps", "32", "--train_batch_size", "2"),
            *("--learning_rate", "1e-3", "--seed", "1", "--max_data_loader_n_workers", "0"),
            *("--output_dir", str(tmp_path / output), "--output_name", "x", "--max_train_steps", str(steps)),
            *options,
        ]
        module.train(module.setup_parser().parse_args(argv))
        return tmp_path / output

    return run
