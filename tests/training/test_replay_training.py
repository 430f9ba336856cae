"""Recorded trainings of the original, replayed through the real loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.replay_training import replay_case

FOLDER = Path(__file__).parents[1] / "reference" / "training"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/case.json"))


def test_the_cases_of_this_scope_are_there() -> None:
    assert {"sd15_lora", "sd15_lora_conv_snr_accum", "sd15_lora_weighted_captions", "sd21_lora_v"} <= set(CASES)
    assert {"sdxl_lora", "sdxl_lora_cached_text", "sdxl_oft"} <= set(CASES)
    assert {"sd15_db", "sd15_fine_tune", "sdxl_train_block_lr", "sdxl_train_text"} <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    family = json.loads((FOLDER / name / "case.json").read_text(encoding="utf-8"))["family"]
    report = replay_case(FOLDER / name, request.getfixturevalue(f"tiny_{family}"), tmp_path)
    assert report.passed, report.line()


def test_a_difference_is_told(tiny_sd15: Path, tmp_path: Path) -> None:
    """A recorded value that is changed makes the replay fail."""
    import shutil

    from safetensors.torch import load_file, save_file

    case = shutil.copytree(FOLDER / "sd15_lora", tmp_path / "case")
    trace = load_file(case / "trace.safetensors")
    trace["step2.loss"] *= 1.001
    save_file(trace, case / "trace.safetensors")
    (tmp_path / "work").mkdir()
    assert not replay_case(case, tiny_sd15, tmp_path / "work").passed
