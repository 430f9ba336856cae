"""Recorded runs of the original: text to image, networks, sample pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.replay_generation import replay_case

FOLDER = Path(__file__).parents[1] / "reference" / "generation"
# Regional networks come with inpainting's masks.
LATER = {"sd15_regional"}
CASES = sorted({path.parent.name for path in FOLDER.glob("*/case.json")} - LATER)


def test_cases_are_there() -> None:
    assert len(CASES) >= 22
    assert all((FOLDER / name).is_dir() for name in LATER)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tiny_sd15: Path, tiny_sd21: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    case = json.loads((FOLDER / name / "case.json").read_text(encoding="utf-8"))
    models = {"sd15": tiny_sd15, "sd21": tiny_sd21, "sdxl": tiny_sdxl}
    report = replay_case(FOLDER / name, models[case["family"]], tmp_path)
    assert report.passed, report.line()
