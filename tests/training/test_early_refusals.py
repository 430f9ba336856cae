"""What cannot work at the end of a run, or after its caches, is refused before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.messages import UserError
from library.training import assemble
from tests.training.runs import options_of, train

SMALL_MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--resume", "nowhere-state", "no such folder"), ("--optimizer_type", "AdamWW", "did you mean AdamW")],
)
def test_before_the_model_is_opened(
    option: str, value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> None:
        pytest.fail("the model was opened")

    monkeypatch.setattr(assemble, "prepare_model", opened)
    with pytest.raises(UserError, match=says):
        train("train_db.py", options_of("train_db.py", SMALL_MODEL, tmp_path, option, value))


def test_a_model_that_one_file_cannot_describe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a single file cannot say"):
        train("train_db.py", options_of("train_db.py", SMALL_MODEL, tmp_path / "out", steps=1))
    assert not (tmp_path / "out").exists(), "steps were made first"


def test_an_empty_vae_as_front_ends_write_it_is_none(tmp_path: Path) -> None:
    options = ("--vae", "", "--save_model_as", "diffusers_safetensors")
    train("train_db.py", options_of("train_db.py", SMALL_MODEL, tmp_path, *options, steps=1))
    assert (tmp_path / "x").is_dir()
