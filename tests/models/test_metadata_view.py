"""Metadata as it is shown: for programs as the original showed it, for readers unfolded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.messages import UserError
from library.models.metadata_view import readable, show_metadata
from library.options.model_tools import ModelMetadataConfig

RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "tools_misc.json").read_text(encoding="utf-8"))
ERRORS = {"missing file": "does not exist", "not safetensors": "is not a model file"}


def test_every_recorded_area_is_known() -> None:
    """`scan` is about folders of pictures."""
    assert set(RECORDED) - {"description"} == {"show_metadata", "scan"}
    assert {case["case"] for case in RECORDED["show_metadata"] if case["error"]} == set(ERRORS)


@pytest.mark.parametrize("case", RECORDED["show_metadata"], ids=lambda case: case["case"])
def test_recorded_output(case: dict, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.safetensors"
    if case["case"] == "not safetensors":
        path.write_text("this is a text file and nothing else")
    elif not case["error"]:
        save_file({"a": torch.zeros(1)}, path, case["metadata"])
    options = ModelMetadataConfig(model=str(path), json=True)
    if case["error"]:
        with pytest.raises(UserError, match=ERRORS[case["case"]]):
            show_metadata(options)
    else:
        show_metadata(options)
    assert capsys.readouterr().out == case["stdout"]


def test_readable(tmp_path: Path, capsys) -> None:
    tags = {"10_cat": {f"tag {i}": i for i in range(25)}}
    texts = {
        "ss_tag_frequency": json.dumps(tags),
        "modelspec.title": "題",
        "ss_broken": "{",
        "ss_list": "[1, 2]",
        "ss_sets": '[{"a": 1}]',
        "z": "two\nlines",
    }
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", texts)
    show_metadata(ModelMetadataConfig(model=str(tmp_path / "a.safetensors")))
    shown = capsys.readouterr().out
    assert shown.startswith("modelspec.title: 題\nss_broken: {\nss_list: 1, 2\nss_sets:\n    [0]:\n        a: 1\n")
    assert "    10_cat:\n        tag 0: 0\n" in shown
    assert "tag 20" not in shown and "... and 5 more" in shown
    assert shown.endswith("z: two\n    lines\n")


def test_readable_of_empty_tables() -> None:
    assert readable({"a": "{}", "b": "[]"}) == "a: {}\nb:"


def test_a_pickle_has_no_metadata(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no metadata"):
        show_metadata(ModelMetadataConfig(model=str(tmp_path / "a.ckpt")))
