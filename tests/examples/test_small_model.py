"""The shipped model follows captions, and a short LoRA training teaches it a new shape: measured in pixels."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))

import judge
import shapes


def test_the_judge_sees_what_was_drawn() -> None:
    rng = random.Random(0)
    looks = [shapes.random_look(rng, (*shapes.SHAPES, shapes.NEW_SHAPE)) for _ in range(100)]
    assert [shapes.judge(shapes.draw(look, rng)) for look in looks] == looks


def test_the_judge_sees_nothing_in_an_empty_picture() -> None:
    from PIL import Image

    assert shapes.judge(Image.new("RGB", (64, 64), (128, 128, 128))) is None


def test_captions_are_followed() -> None:
    looks = judge.some_looks(40)
    pictures = judge.draw(judge.open_engine(EXAMPLE / "model"), looks)
    assert judge.share(looks, pictures, "shape", "color", "background") >= 0.9


def test_the_demo_teaches_a_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.options.parser import parse
    from library.training.network_trainer import NetworkTrainer

    monkeypatch.chdir(EXAMPLE.parents[1])
    options = ("--config_file", str(EXAMPLE / "train.toml"), "--output_dir", str(tmp_path))
    NetworkTrainer().train(parse("train_network.py", options))

    looks = judge.some_looks(30, shapes.NEW_SHAPE)
    before = judge.draw(judge.open_engine(EXAMPLE / "model"), looks)
    after = judge.draw(judge.open_engine(EXAMPLE / "model", tmp_path / "heart.safetensors"), looks)
    assert judge.share(looks, before, "shape") <= 0.1
    assert judge.share(looks, after, "shape") >= 0.8


def test_the_model_is_small() -> None:
    size = sum(file.stat().st_size for file in (EXAMPLE / "model").rglob("*") if file.is_file())
    assert size <= 20e6
