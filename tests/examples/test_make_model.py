"""The recipe of the shipped model is one that the training script takes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from library.options.parser import parse
from train_db import SCRIPT, train

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def test_two_steps_of_the_recipe(tmp_path: Path) -> None:
    changed = ("--pretrained_model_name_or_path", str(QUICKSTART / "model"), "--output_dir", str(tmp_path))
    pictures = ("--train_data_dir", str(QUICKSTART / "pictures"), "--train_batch_size", "2", "--max_train_steps", "2")
    recipe = str(QUICKSTART / "make_model" / "train_base.toml")
    train(parse(SCRIPT, ["--config_file", recipe, *changed, *pictures, "--lr_warmup_steps", "0"]))
    file = "unet/diffusion_pytorch_model.safetensors"
    unets = [load_file(tmp_path / name / file) for name in ("base", "base-ema")]
    assert (tmp_path / "base-ema" / "model_index.json").exists() and (tmp_path / "base-state").is_dir()
    assert any(not torch.equal(unets[0][key], unets[1][key]) for key in unets[0])
