"""The validation loss: fixed draws, training undisturbed, the word about a rise, exact resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.messages import log
from library.training.network_trainer import NetworkTrainer
from library.training.record import read_record
from library.training.validation import Watch
from tests.two_processes import run_both

HELD_OUT = ("--validation_split", "0.34", "--cache_latents", "--max_validation_steps", "1")
VARIED = (
    *("--shuffle_caption", "--caption_dropout_rate", "0.3", "--network_dropout", "0.2", "--noise_offset", "0.1"),
    *("--gradient_accumulation_steps", "2"),
)


def passes(folder: Path) -> list[dict[str, Any]]:
    lines = read_record(folder / "x-metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if line["kind"] == "validation"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "x.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_validation_does_not_change_the_training(train) -> None:
    options = (*HELD_OUT, *VARIED)
    often = train(*options, "--validate_every_n_steps", "1", output="often")
    seldom = train(*options, "--validate_every_n_epochs", "99", output="seldom")
    assert_equal(weights(often), weights(seldom))
    assert [one["step"] for one in passes(often)] == [0, 1, 2, 3, 4]
    assert [one["step"] for one in passes(seldom)] == [0, 4], "the first and the last weights are always measured"


def test_same_weights_have_the_same_loss_every_time(train) -> None:
    out = train(*HELD_OUT, *VARIED, "--learning_rate", "1e-30", "--validate_every_n_steps", "2")
    first, *others = passes(out)
    assert len(others) == 2
    assert all(one["loss"] == first["loss"] and one["timesteps"] == first["timesteps"] for one in others)
    assert list(first["timesteps"]) == ["200", "400", "600", "800"]
    assert first["loss"] == pytest.approx(sum(first["timesteps"].values()) / 4)


def test_pictures_and_seed_decide(train) -> None:
    one = passes(train(*HELD_OUT, output="a", steps=1))[0]["loss"]
    other_noise = passes(train(*HELD_OUT, "--validation_seed", "5", output="b", steps=1))[0]["loss"]
    more = passes(train(*HELD_OUT, "--max_validation_steps", "9", output="c", steps=1))[0]["loss"]
    assert len({one, other_noise, more}) == 3


def test_every_epoch_unless_told_otherwise(train) -> None:
    out = train(*HELD_OUT, steps=6)
    lines = read_record(out / "x-metrics.jsonl")
    steps = kind(lines, "step")
    ends = [a["step"] for a, b in itertools.pairwise(steps) if a["epoch"] < b["epoch"]]
    assert [one["step"] for one in passes(out)] == sorted({0, *ends, 6})


def kind(lines: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == name]


def test_trackers_get_the_keys(train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import Accelerator

    logged: list[tuple[int, dict]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None, **_: logged.append((step, values)))
    logs = ("--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard")
    train(*HELD_OUT, *logs, "--validate_every_n_steps", "2", "--ema_decay", "0.5")
    of_steps = [(step, v) for step, v in logged if "loss/validation/step_average" in v]
    assert [step for step, _ in of_steps] == [0, 2, 4]
    assert set(of_steps[0][1]) == {
        *("loss/validation/step_average", "loss/validation/step_divergence", "loss/validation/ema_step_average"),
        *(f"loss/validation/timestep_{t}" for t in (200, 400, 600, 800)),
    }
    train(*HELD_OUT, *logs, "--validate_every_n_epochs", "1", output="b")
    assert any({"loss/validation/epoch_average", "loss/validation/epoch_divergence"} <= set(v) for _, v in logged)


def test_validation_and_average_resume_exactly(train) -> None:
    """Stopped twice in the middle of an epoch: weights, average, losses and what is watched are the same."""
    options = (*HELD_OUT, *VARIED, "--train_batch_size", "1")
    options += ("--validate_every_n_steps", "1", "--ema_decay", "0.6", "--ema_start", "1", "--save_state")
    whole = train(*options, "--save_every_n_steps", "3", output="whole", steps=4)
    a = train(*options, output="a", steps=1)
    b = train(*options, "--save_every_n_steps", "3", "--resume", str(a / "x-state"), output="b", steps=3)

    states = [folder / "x-step00000003-state" for folder in (whole, b)]
    one, two = [json.loads((state / "run.json").read_text()) for state in states]
    assert one["position"] == two["position"] == {"epoch": 2, "micro": 2, "step": 3}, "in the middle of an epoch"
    assert (one["validation"], one["ema_updates"]) == (two["validation"], two["ema_updates"])
    assert_equal(*[load_file(state / "average.safetensors") for state in states])

    c = train(*options, "--resume", str(states[1]), output="c", steps=4)
    for name in ("x.safetensors", "x-ema.safetensors"):
        assert_equal(load_file(whole / name), load_file(c / name))
    assert passes(whole) == passes(c), "the record goes on without a gap or a double line"


def test_hooks_are_told_that_it_is_no_training(train) -> None:
    seen: list[tuple] = []

    class Trainer(NetworkTrainer):
        def on_step_start(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train=True):
            seen.append(("start", is_train, network.training))

        def get_noise_pred_and_target(self, args, *rest, is_train=True, **more):
            seen.append(("predict", is_train, args.min_timestep))
            return super().get_noise_pred_and_target(args, *rest, **more)

        def on_validation_step_end(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype):
            seen.append(("end", len(batch["captions"])))

    out = train(*HELD_OUT, steps=1, trainer=Trainer())
    first = seen[:9]
    assert first[:8] == [x for t in (200, 400, 600, 800) for x in (("start", False, False), ("predict", False, t))]
    assert first[8][0] == "end"
    assert seen[9:11] == [("start", True, True), ("predict", True, None)]
    assert passes(out)[0]["timesteps"] == passes(train(*HELD_OUT, output="b", steps=1))[0]["timesteps"], (
        "the trainer's own way gives the same losses"
    )


def test_a_rise_is_told_once_and_said_from_where() -> None:
    watch = Watch()
    losses = [1.0, 0.8, 0.81, 0.79, 0.792, 0.791, 0.7935, 0.795, 0.8, 0.9]
    said = [watch.see(10 * number, loss) for number, loss in enumerate(losses)]
    assert [number for number, text in enumerate(said) if text] == [7]
    assert "since step 30: 0.79 there, 0.795 now" in said[7]
    assert watch.best_step == 30


def test_a_rise_reaches_user_and_record(train, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("library.training.validation.RISING_SHARE", 0.0)
    monkeypatch.setattr("library.training.validation.RISING_PASSES", 1)
    log.propagate = True
    with caplog.at_level("WARNING", logger=log.name):
        out = train(*HELD_OUT, "--learning_rate", "1e-30", "--validate_every_n_steps", "1")
    assert caplog.text.count("the validation loss rises since step 0") == 1
    assert len(kind(read_record(out / "x-metrics.jsonl"), "notice")) == 1


def test_a_share_of_no_picture_is_told(train, caplog: pytest.LogCaptureFixture) -> None:
    log.propagate = True
    with caplog.at_level("WARNING", logger=log.name):
        out = train("--validation_split", "0.01", steps=1)
    assert "--validation_split 0.01 holds out no picture" in caplog.text
    assert passes(out) == []


def test_sdxl_is_validated_too(train_sdxl) -> None:
    out = train_sdxl(*HELD_OUT, "--validate_every_n_steps", "1", "--network_train_unet_only", steps=1)
    first, last = passes(out)
    assert first["loss"] != last["loss"] and abs(first["loss"] - last["loss"]) < 0.1


def test_two_processes_measure_what_one_does(command, train, tmp_path: Path) -> None:
    """One picture a bucket: the second process repeats the first one's, which counts once."""
    options = ("--validation_split", "0.34", "--ema_decay", "0.5", "--save_state")
    run_both("train_network.py", command(*options, output="two", steps=1), tmp_path)
    one, two = train(*options, "--train_batch_size", "4", output="one", steps=1), tmp_path / "two"
    assert passes(two)[0]["loss"] == pytest.approx(passes(one)[0]["loss"], rel=1e-5)
    assert [one["step"] for one in passes(two)] == [0, 1]
    assert (two / "x-ema.safetensors").exists() and (two / "x-report.html").exists()
    (step,) = kind(read_record(two / "x-metrics.jsonl"), "step")
    assert sum(count for _, count in step["bands"]) in (2, 3, 4), "samples of both processes"
