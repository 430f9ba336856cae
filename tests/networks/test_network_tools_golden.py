"""The tools on network files against the original's output on the same small files."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.messages import UserError
from library.models.family import LoadedModel
from library.models.hashes import network_hashes
from networks import algebra, extraction
from networks.tool_files import iterate_state, minimum_metadata
from tests.conftest import GOLDEN, load_json
from tests.networks.tool_models import module_of

DATA: Any = load_json(GOLDEN / "networks_tools.json")
FLOAT = torch.float32


def tool(name: str) -> Any:
    return importlib.import_module(f"networks.{name}")


def file(name: str) -> str:
    return str(GOLDEN / f"networks_tools_{name}.safetensors")


def inputs(case: dict[str, Any]) -> list[str]:
    return [file(f"in_{letter}") for letter in case["inputs"]]


def metadata_of(path: str | Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as opened:
        return opened.metadata() or {}


def without_hashes(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if not key.startswith(("sshs_", "modelspec."))}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=lambda text, k=key: f"{k}: {text}")


def assert_same_updates(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal keys, shapes and dtypes; factors may differ in the signs of singular vectors, products not."""
    assert found.keys() == expected.keys()
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    ours = dict(iterate_state(found))
    for name, module in iterate_state(expected):
        assert ours[name].alpha == pytest.approx(module.alpha), name
        torch.testing.assert_close(
            algebra.delta(ours[name].up, ours[name].down), algebra.delta(module.up, module.down), atol=1e-4, rtol=0
        )


def test_every_golden_file_is_used() -> None:
    used = {"in_a", "in_b", "in_c", "in_d", "in_e", "model_base", "merge_model_ab", "merge_model_old_ab"}
    used |= {"merge_old_ad", "svd_merge_ac", "extract_org", "extract_tuned", "split-0003", "split-0006"}
    used |= {case["name"] for kind in ("merge_lora", "resize", "extract") for case in DATA[kind]}
    assert used == {path.stem[len("networks_tools_") :] for path in GOLDEN.glob("networks_tools_*.safetensors")}


@pytest.mark.parametrize("case", DATA["merge_lora"], ids=lambda case: case["name"])
def test_merge_lora(case: dict[str, Any]) -> None:
    torch.manual_seed(case["torch_seed_before"])
    state, metadata, v2 = tool("merge_lora").merge_lora_models(
        inputs(case), case["ratios"], FLOAT, case.get("concat", False), case.get("shuffle", False)
    )
    assert_same_tensors(state, load_file(file(case["name"])))
    expected = dict(case["metadata"])
    if case.get("concat"):  # the original writes the first file's rank; here it is the real one
        expected["ss_network_dim"] = "6"
    assert metadata == expected
    assert v2 == case["v2"]


def test_ranks_that_differ_are_refused() -> None:
    """AssertionError in the original (`merge_a_with_c_without_concat_raises`); here a line with a remedy."""
    assert DATA["merge_a_with_c_without_concat_raises"] == "AssertionError"
    with pytest.raises(UserError, match="--concat"):
        tool("merge_lora").merge_lora_models([file("in_a"), file("in_c")], [1.0, 1.0], FLOAT)


def test_merge_lora_old() -> None:
    case = DATA["merge_lora_old"]
    merge = tool("merge_lora_old").merge_lora_models
    state, dim, alpha = merge(inputs(case), case["ratios"], FLOAT)
    assert_same_tensors(state, load_file(file("merge_old_ad")))
    assert (dim, alpha) == (case["dim"], case["alpha"])
    assert case["a_with_b_raises"] == "AssertionError"
    with pytest.raises(UserError, match="different alphas"):
        merge([file("in_a"), file("in_b")], [1.0, 1.0], FLOAT)


@pytest.mark.parametrize(
    ("script", "case"), [("merge_lora", "merge_model_ab"), ("merge_lora_old", "merge_model_old_ab")]
)
def test_merge_into_model(script: str, case: str) -> None:
    base, expected = load_file(file("model_base")), load_file(file(case))
    text_encoder, unet = module_of(base, "te."), module_of(base, "unet.")
    tool(script).merge_to_sd_model(text_encoder, unet, inputs(DATA[case]), DATA[case]["ratios"], FLOAT)
    found = {f"te.{k}": v for k, v in text_encoder.state_dict().items()}
    found |= {f"unet.{k}": v for k, v in unet.state_dict().items()}
    changed = [key for key, value in found.items() if not torch.equal(value, base[key])]
    assert sorted(changed) == sorted(DATA[case]["changed"]) == sorted(expected)
    for key in changed:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0)


def test_svd_merge() -> None:
    case = DATA["svd_merge"]
    state, metadata, v2, base = tool("svd_merge_lora").merge_lora_models(
        inputs(case), case["ratios"], case["new_rank"], case["new_conv_rank"], "cpu", FLOAT
    )
    assert_same_updates(state, load_file(file("svd_merge_ac")))
    assert (metadata, v2, base) == (case["metadata"], case["v2"], case["base_model"])


@pytest.mark.parametrize("case", DATA["resize"], ids=lambda case: case["name"])
def test_resize(case: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "resized.safetensors"
    names = ("new_rank", "dynamic_method", "dynamic_param")
    arguments = {name: case[name] for name in names}
    tool("resize_lora").resize(argparse.Namespace(model=file("in_e"), save_to=str(target), device="cpu", **arguments))
    found = load_file(target)
    assert_same_updates(found, load_file(file(case["name"])))
    assert {name: module.rank for name, module in iterate_state(found)} == case["dims"]
    assert {name: module.alpha for name, module in iterate_state(found)} == pytest.approx(case["alphas"])
    metadata = metadata_of(target)
    assert without_hashes(metadata) == without_hashes(case["metadata"])
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == network_hashes(
        found, {k: v for k, v in metadata.items() if not k.startswith("sshs_")}
    )


def test_rank_functions() -> None:
    wrong = []
    for case in DATA["rank_functions"]:
        found = algebra.rank_resize(torch.tensor(case["S"]), case["cap"], case["method"], case["param"], 0.5)
        expected = {key: float(value) for key, value in case["result"].items()}
        if found != pytest.approx(expected, rel=1e-6, nan_ok=True):
            wrong.append((case, found))
    assert not wrong


def test_extract_from_dylora(tmp_path: Path) -> None:
    tool("extract_lora_from_dylora").split(
        argparse.Namespace(model=file("in_e"), unit=3, save_to=str(tmp_path / "split.safetensors"))
    )
    cases = DATA["extract_from_dylora"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(case["file"] for case in cases)
    for case in cases:
        found = load_file(tmp_path / case["file"])
        assert {key: list(value.shape) for key, value in found.items()} == case["shapes"]
        for key, value in load_file(file(Path(case["file"]).stem)).items():
            assert torch.equal(found[key], value), key
        metadata = metadata_of(tmp_path / case["file"])
        assert without_hashes(metadata) == without_hashes(case["metadata"])
        # the original leaves the hashes of another file; here each has its own
        assert metadata["sshs_model_hash"] == network_hashes(found, metadata)[0]


@pytest.mark.parametrize("case", DATA["extract"], ids=lambda case: case["name"])
def test_extract(case: dict[str, Any]) -> None:
    original, tuned = load_file(file("extract_org")), load_file(file("extract_tuned"))
    if not case["text_encoder_changed"]:
        tuned |= {key: value for key, value in original.items() if key.startswith("te.")}
    with_convs = case["conv_dim"] is not None
    models = [LoadedModel([module_of(w, "te.")], None, module_of(w, "unet.")) for w in (original, tuned)]
    result = extraction.extract(
        *(extraction.weights_of(model, with_convs) for model in models),
        dim=case["dim"],
        conv_dim=case["conv_dim"],
        device=torch.device("cpu"),
        min_diff=0.1,
        clamp_quantile=0.99,
        dtype=FLOAT,
    )
    expected = load_file(file(case["name"]))
    assert_same_updates(result.state, expected)
    assert case["alpha_dtypes"] == ["torch.float32"]
    convs = {"conv_dim": case["conv_dim"], "conv_alpha": case["conv_dim"]} if with_convs else {}
    metadata = minimum_metadata(False, "sd_v1", case["dim"], case["dim"], convs)
    assert metadata == without_hashes(case["metadata"])
