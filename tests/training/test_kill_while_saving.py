"""A process that is killed while it saves: what carries a final name is whole, and the newest of it can be used."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training import loop, state
from library.training.run import Run
from tests.training.runs import options_of, train

KILLS = 7
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the saving process is a fork")


def run_of(script: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is ready for its first step."""
    runs: list[Run] = []
    monkeypatch.setattr(loop, "train", runs.append)
    train(script, options)
    return runs[0]


def save_for_ever(run: Run) -> None:
    """Save at every step; all weights are the number of the step."""
    run.log.record = None
    while True:
        run.position.step += 1
        with torch.no_grad():
            for parameter in run.target.trainable_parameters():
                parameter.fill_(float(run.position.step))
        run.saver.after_update(run)


def kill_while(work: Callable[[], None], seconds: float) -> None:
    """Do the work in a process of its own and kill it after so many seconds."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended before it was killed"


def trained_values(tensors: dict[str, torch.Tensor], names: set[str]) -> set[float]:
    return {value for name in names for value in tensors[name].float().unique().tolist()}


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("train_network.py", ()),
        ("train_db.py", ("--stop_text_encoder_training", "-1")),
        ("train_db.py", ("--stop_text_encoder_training", "-1", "--save_model_as", "diffusers_safetensors")),
    ],
    ids=["network", "model file", "model folder"],
)
def test_kill_while_saving(
    script: str, more: tuple[str, ...], tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = ("--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "3")
    run = run_of(script, options_of(script, tiny_sd15, tmp_path / "out", *saves, *more), monkeypatch)
    draw = random.Random(script)
    for _ in range(KILLS):
        kill_while(lambda: save_for_ever(run), draw.uniform(0.05, 0.6))
        check(tmp_path / "out", run, script)
    assert list((tmp_path / "out").glob("x-step*")), "no save was finished in any of the tries"


def check(folder: Path, run: Run, script: str) -> None:
    """Every file and folder with a final name is whole and of one step; the newest state restores the run."""
    steps = [path for path in folder.iterdir() if path.name.startswith("x-step")]
    states = [path for path in steps if path.name.endswith("-state")]
    for path in set(steps) - set(states):
        number = float(path.stem.removeprefix("x-step"))
        if script == "train_network.py":
            tensors = load_file(path)
            names = {name for name in tensors if not name.endswith("alpha")}
        elif path.is_dir():
            tensors = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
            names = set(tensors)
            assert (path / "model_index.json").is_file()
        else:
            tensors = load_file(path)
            names = {name for name in tensors if name.startswith("model.diffusion_model.")}
        assert names and trained_values(tensors, names) == {number}, path.name
    for path in states:
        number = int(path.name.removeprefix("x-step").removesuffix("-state"))
        facts = json.loads((path / state.RUN_FILE).read_text(encoding="utf-8"))
        assert facts["position"]["step"] == number
        state.read_parts(path)
    if states:
        state.load_state(run, max(states))
        assert {value for p in run.target.trainable_parameters() for value in p.unique().tolist()} == {
            float(run.position.step)
        }
        run.position.step = 0
