"""Every script and kind of optimizer, resumed at random steps, ends with the weights of a whole run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.options.registries import OPTIMIZERS
from tests.training.runs import SCRIPTS, options_of, train

STEPS = 6  # two epochs of three steps
VARIED = (
    "--shuffle_caption",
    "--flip_aug",
    "--noise_offset",
    "0.1",
    "--lr_scheduler",
    "cosine",
    "--lr_warmup_steps",
    "2",
)


def resumed(script: str, model: Path, folder: Path, *options: str, times: int = 1) -> tuple[dict, dict]:
    """Weights of one whole run, and of the last of those that went on from a state of the one before."""
    stops = sorted(random.Random(f"{script} {options}").sample(range(1, STEPS), times))

    def run(name: str, following: list[int], *more: str) -> Path:
        saves = ("--save_state", "--save_every_n_steps", str(following[0])) if following else ()
        train(script, options_of(script, model, folder / name, *options, *saves, *more, steps=STEPS))
        return folder / name

    before = whole = run("whole", stops)
    for number, stop in enumerate(stops):
        state = str(before / f"x-step{stop:08d}-state")
        before = run(f"resumed{number}", stops[number + 1 :], "--resume", state)
    return load_file(whole / "x.safetensors"), load_file(before / "x.safetensors")


def assert_equal(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> None:
    assert set(whole) == set(parts)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(f"tiny_{SCRIPTS[script][0]}")
    options = [option for option in VARIED if option != "--shuffle_caption" or "inversion" not in script]
    assert_equal(*resumed(script, model, tmp_path, *options, times=2))


def test_loader_workers(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Those of a LoRA: test_resume.py."""
    assert_equal(*resumed("sdxl_train.py", tiny_sdxl, tmp_path, *VARIED, "--max_data_loader_n_workers", "2"))


def kinds() -> list[str]:
    """Optimizers whose package is here; those of bitsandbytes need a graphics card."""
    return [record.name for record in OPTIMIZERS if record.package != "bitsandbytes"]


@pytest.mark.parametrize("optimizer", kinds())
def test_optimizers(optimizer: str, tiny_sd15: Path, tmp_path: Path) -> None:
    options = ["--optimizer_type", optimizer]
    if optimizer == "AdaFactor":
        options += ["--optimizer_args", "relative_step=False"]
    assert_equal(*resumed("train_network.py", tiny_sd15, tmp_path, *options))


@pytest.mark.parametrize("way", [("--fused_backward_pass",), ("--fused_optimizer_groups", "3")])
def test_updates_inside_the_backward_pass(way: tuple[str, ...], tiny_sdxl: Path, tmp_path: Path) -> None:
    options = ("--optimizer_type", "AdaFactor", "--optimizer_args", "relative_step=False", *way)
    assert_equal(*resumed("sdxl_train.py", tiny_sdxl, tmp_path, *options))


def test_half_weights(tiny_sd15: Path, tmp_path: Path) -> None:
    """Rounding at random goes on with the same draws."""
    assert_equal(*resumed("train_db.py", tiny_sd15, tmp_path, "--mixed_precision", "bf16", "--full_bf16"))
