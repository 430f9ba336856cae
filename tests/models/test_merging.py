"""Weighted sums of model files against those that the original wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.messages import UserError, log
from library.models.merging import RECIPE_KEY, checked_ratios, current_name, merge_files
from library.options.model_tools import ModelMergeConfig

ROOT = Path(__file__).parent.parent.parent
RECORDED = json.loads((ROOT / "tests" / "golden" / "tools_merge_models.json").read_text(encoding="utf-8"))["cases"]
ERRORS = {"ratio count differs": "one ratio for each model", "missing file": "does not exist"}
# Its recorded sums count the text encoder of the first model twice.
OLD_SPELLING = "text-encoder keys of the second model in the old spelling"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", log.name)
    return caplog


def run_case(case: dict, golden: Path, folder: Path) -> Path:
    options = dict(case["options"])
    output = folder / options.pop("output", "out")
    models = [str(golden / name) for name in case["models"]]
    return merge_files(ModelMergeConfig(models=models, output=str(output), **options))


def test_every_case_is_there() -> None:
    names = {case["case"] for case in RECORDED}
    assert len(RECORDED) == len(names) == 25
    assert names > {OLD_SPELLING, *ERRORS}
    assert {case["case"] for case in RECORDED if case["error"]} == set(ERRORS)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["case"])
def test_recorded_merges(case: dict, golden: Path, tmp_path: Path, messages) -> None:
    if case["error"]:
        with pytest.raises(UserError, match=ERRORS[case["case"]]):
            run_case(case, golden, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    written = run_case(case, golden, tmp_path)
    assert written == tmp_path / case["output_file"]
    tensors, expected = load_file(written), load_file(golden / case["golden"])
    first = {current_name(k): v for k, v in load_file(golden / case["models"][0]).items()}
    # The original turned the integers of position ids into floating numbers.
    integers = {name for name, value in first.items() if not value.is_floating_point()}
    assert tensors.keys() == expected.keys() == first.keys()
    if case["case"] == OLD_SPELLING:
        second = {current_name(k): v for k, v in load_file(golden / case["models"][1]).items()}
        expected = {name: 0.5 * first[name] + 0.5 * second[name] for name in first}
    for name, value in tensors.items():
        if name in integers:
            assert value.equal(first[name])
            continue
        assert str(value.dtype) == "torch." + case["tensors"][name]["dtype"], name
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    said = [record.getMessage() for record in messages.records]
    lacking = case["says_not_in_model"] if case["case"] != OLD_SPELLING else []
    told = [line.split(" lacks ")[1].split(":")[0] for line in said if line.endswith("counts instead")]
    assert told == lacking
    assert [line.split(": ")[1].split(" is left")[0] for line in said if "is left out" in line] == case["says_skip"]


def test_metadata_tells_the_recipe(golden: Path, tmp_path: Path) -> None:
    case = next(case for case in RECORDED if case["case"] == "two models, ratios")
    with safe_open(run_case(case, golden, tmp_path), "pt") as file:
        texts = file.metadata()
    assert (texts["modelspec.title"], texts["modelspec.merged_from"]) == ("out", "a, tools_merge_models_in_b")
    assert json.loads(texts[RECIPE_KEY])["ratios"] == [0.7, 0.3]
    assert texts["modelspec.hash_sha256"].startswith("0x") and texts["modelspec.hash_sha256"] != "0x" + "0" * 64


def test_a_whole_model_stays_what_it_is(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Marks of v-prediction and ModelSpec's word for it survive."""
    state = load_file(tiny_sdxl) | {"v_pred": torch.empty(0)}
    save_file(state, tmp_path / "v.safetensors")
    models = [str(tmp_path / "v.safetensors")] * 2
    merge_files(ModelMergeConfig(models=models, output=str(tmp_path / "m"), ratios=[0.25, 0.75]))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        texts = file.metadata()
    assert texts["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert texts["modelspec.prediction_type"] == "v"
    merged = load_file(tmp_path / "m.safetensors")
    assert merged.keys() == state.keys()
    assert all(torch.allclose(merged[k].float(), state[k].float(), atol=1e-6) for k in state)


def test_models_of_two_families_are_refused(tiny_sd15: Path, tiny_sd21: Path, tmp_path: Path) -> None:
    options = ModelMergeConfig(models=[str(tiny_sd15), str(tiny_sd21)], output=str(tmp_path / "m"))
    with pytest.raises(UserError, match=r"model\.diffusion_model\..* is \[.*one family"):
        merge_files(options)
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no safetensors file"):
        merge_files(ModelMergeConfig(models=[str(tmp_path / "a.ckpt")], output=str(tmp_path / "m")))


def test_ratios(messages) -> None:
    assert checked_ratios(["a", "b", "c", "d"], None) == [0.25] * 4
    assert checked_ratios(["a", "b", "c"], [1, 1, -1]) == [1, 1, -1]
    assert not messages.records
    checked_ratios(["a"], [0.5])
    assert "add up to 0.5" in messages.text
    with pytest.raises(UserError, match="finite"):
        checked_ratios(["a"], [float("nan")])


def test_script(golden: Path, tmp_path: Path) -> None:
    model = str(golden / "tools_merge_models_in_a.safetensors")
    command = [sys.executable, str(ROOT / "tools" / "merge_models.py"), "--output", "m", "--models", model]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.safetensors").is_file()
    failed = subprocess.run([*command, "nope.safetensors"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1 and "nope.safetensors does not exist" in failed.stderr
