"""Validation, moving average, samples and report of models and embeddings, resumed in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.record import read_record
from tests.training.runs import SCRIPTS, options_of, train

WATCHED = ("--validation_split", "0.34", "--validate_every_n_steps", "1", "--ema_decay", "0.6", "--save_state")
TARGETS = {"model": "train_db.py", "embedding": "train_textual_inversion.py"}


def loaded(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("script", TARGETS.values(), ids=TARGETS)
def test_watched(script: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(f"tiny_{SCRIPTS[script][0]}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 64 --h 64 --s 1 --d 5", encoding="utf-8")
    samples = ("--sample_every_n_steps", "3", "--sample_prompts", str(prompts), "--sample_at_first")

    def run(name: str, *more: str, steps: int = 3) -> Path:
        options = (*WATCHED, "--train_batch_size", "1", "--learning_rate", "1e-3", *more)
        train(script, options_of(script, model, tmp_path / name, *options, steps=steps))
        return tmp_path / name

    whole = run("whole", *samples)
    plain = run("plain", "--validation_split", "0.34", "--validate_every_n_steps", "99")
    assert same(loaded(whole, "x.safetensors"), loaded(plain, "x.safetensors")), "watching changes nothing"
    assert not same(loaded(whole, "x.safetensors"), loaded(whole, "x-ema.safetensors"))

    lines = read_record(whole / "x-metrics.jsonl")
    passes = [line for line in lines if line["kind"] == "validation"]
    assert [one["step"] for one in passes] == [0, 1, 2, 3]
    assert passes[0]["loss"] == passes[0]["ema"] and passes[-1]["loss"] not in (passes[0]["loss"], passes[-1]["ema"])
    drawn = [line for line in lines if line["kind"] == "sample"]
    assert [(line["step"], line["ema"]) for line in drawn] == [(0, False), (0, True), (3, False), (3, True)]
    assert all((whole / line["path"]).is_file() for line in drawn)
    assert "Sample pictures" in (whole / "x-report.html").read_text(encoding="utf-8")

    first = run("first", steps=2)
    rest = run("rest", "--resume", str(first / "x-state"))
    for name in ("x.safetensors", "x-ema.safetensors"):
        assert same(loaded(whole, name), loaded(rest, name)), name
    again = [line for line in read_record(rest / "x-metrics.jsonl") if line["kind"] == "validation"]
    assert [(one["step"], one["loss"], one["ema"]) for one in again] == [
        (one["step"], one["loss"], one["ema"]) for one in passes
    ]
