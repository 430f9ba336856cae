"""ModelSpec texts against those of the original, 0.7.0 and later."""

from __future__ import annotations

import json
import time

import pytest
import torch

from library.models import modelspec
from library.models.checkpoint_writer import save_tensors
from library.options.metadata import MetadataConfig

# The original fails on a bare number; here it is a square.
MENDED = {"TypeError": "512x512"}


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    if hasattr(time, "tzset"):
        time.tzset()
    yield
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "models_modelspec.json").read_text(encoding="utf-8"))


def test_build_metadata(recorded):
    for case in recorded["build_metadata"]:
        arguments = {"state_dict": None, "timestamp": recorded["timestamp"], **case["args"]}
        if case.get("error") == "ValueError":
            with pytest.raises(ValueError):
                modelspec.build_metadata(**arguments)
            continue
        got = modelspec.build_metadata(**arguments)
        if "error" in case:
            assert got["modelspec.resolution"] == MENDED[case["error"]]
        else:
            assert list(got.items()) == list(case["result"].items()), case["args"]
    assert len(recorded["build_metadata"]) == 108


def test_texts_of_a_run(recorded):
    for case in recorded["get_sai_model_spec"]:
        sdxl, lora, textual_inversion, is_stability = case["call"]
        options = dict(case["options"])
        texts = MetadataConfig(**{k: options.pop(k) for k in list(options) if k.startswith("metadata_")})
        got = modelspec.metadata_of_run(
            texts,
            kind="lora" if lora else "textual_inversion" if textual_inversion else "checkpoint",
            v2=options.pop("v2", False),
            v_parameterization=options.pop("v_parameterization", False),
            sdxl=sdxl,
            timestamp=recorded["timestamp"],
            is_stability_layout=is_stability,
            **options,
        )
        assert list(got.items()) == list(case["result"].items()), case
    assert len(recorded["get_sai_model_spec"]) == 36


def test_merged_from(recorded, tmp_path):
    for case in recorded["merged_from"]:
        for name, metadata in case["files"].items():
            if name.endswith(".ckpt"):
                torch.save({"a": torch.zeros(1)}, tmp_path / name)
            else:
                save_tensors(tmp_path / name, {"a": torch.zeros(1)}, metadata)
        (tmp_path / "dir").mkdir()
        assert modelspec.build_merged_from([str(tmp_path / m) for m in case["models"]]) == case["result"]


def test_later_version(golden, tmp_path, monkeypatch):
    cases = json.loads((golden / "models_modelspec_later.json").read_text(encoding="utf-8"))["cases"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.png").write_bytes(bytes.fromhex("89504E470D0A1A0A31323334"))
    assert len(cases) == 19
    for case in cases:
        got = modelspec.build_metadata(None, timestamp=1700000000.75, spec_version="1.0.1", **case["args"])
        wanted = dict(case["result"])
        if wanted["modelspec.implementation_version"].startswith("sd-scripts/"):
            wanted["modelspec.implementation_version"] = modelspec.IMPLEMENTATION_VERSION
        assert got == wanted, case["args"]
        assert list(got) == list(wanted), case["args"]


def test_texts_of_the_later_version_raise_the_version():
    plain = modelspec.metadata_of_run(
        MetadataConfig(), kind="lora", v2=False, v_parameterization=False, sdxl=False, timestamp=0.0, output_name="n"
    )
    hint = modelspec.metadata_of_run(
        MetadataConfig(metadata_usage_hint="use it"),
        kind="lora",
        v2=False,
        v_parameterization=False,
        sdxl=False,
        timestamp=0.0,
        output_name="n",
    )
    assert plain["modelspec.sai_model_spec"] == "1.0.0" and "modelspec.implementation_version" not in plain
    assert hint["modelspec.sai_model_spec"] == "1.0.1" and hint["modelspec.usage_hint"] == "use it"


def test_implementation_version_is_that_of_the_project():
    from pathlib import Path

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    name, _, version = modelspec.IMPLEMENTATION_VERSION.partition("/")
    assert f'name = "{name}"' in project and f'version = "{version}"' in project
