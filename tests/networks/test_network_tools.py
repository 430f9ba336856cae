"""The tools on network files as scripts: streams, errors, mix-ups of families, metadata, forms of calls."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.messages import UserError
from library.models.family import family
from networks import algebra, lora, names, oft
from networks.block_weights import parse_block_weights, position_of
from networks.tool_files import iterate_state, open_network, open_networks
from networks.tool_functions import merge_opened, open_sdxl_networks
from tests.conftest import GOLDEN, REFERENCE
from tests.networks.network_models import randomize

ROOT = Path(__file__).parent.parent.parent
DATA = REFERENCE / "generation" / "data"
A, B, C = (str(GOLDEN / f"networks_tools_in_{letter}.safetensors") for letter in "abc")
SD, SDXL = str(DATA / "lora_a_sd15.safetensors"), str(DATA / "lora_sdxl.safetensors")


def tool(name: str) -> Any:
    return importlib.import_module(f"networks.{name}")


def call(name: str, function: str, **options: Any) -> None:
    getattr(tool(name), function)(argparse.Namespace(**options))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as opened:
        return opened.metadata() or {}


def updates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: algebra.delta(m.up, m.down, m.scale) for name, m in iterate_state(state)}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    error = algebra.Error()
    for name, value in exact.items():
        error.add((found[name] - value).norm().item(), value.norm().item())
    return error.relative


# Scripts


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["check_lora_weights.py", A], 0, "number of LoRA tensors: 42"),
        (["merge_lora.py", "--models", A, B, "--ratios", "1", "--save_to", "x"], 1, "give one ratio for each model"),
        (["merge_lora.py", "--models", A], 1, "--ratios"),
        (["resize_lora.py", "--model", A, "--save_to", "x.bin"], 1, "suffix"),
        (["resize_lora.py", "--model", A, "--save_to", "x.pt", "--dynamic_method", "sv_fro"], 1, "--dynamic_param"),
        (["extract_lora_from_dylora.py", "--model", A, "--unit", "9", "--save_to", "x.pt"], 1, "rank 4"),
    ],
)
def test_scripts_run_from_anywhere(command: list[str], code: int, words: str, tmp_path: Path) -> None:
    """Each puts the repository's folder on the path itself; errors are one line."""
    script = ROOT / "networks" / command[0]
    result = subprocess.run([sys.executable, script, *command[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_shows_every_tensor_once(capsys: pytest.CaptureFixture) -> None:
    tool("check_lora_weights").check(argparse.Namespace(file=A, show_all_keys=True))
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split(",")[0] for line in lines if "," in line]
    assert sorted(keys) == sorted(load_file(A))
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    size = load_file(A)[key].abs()
    assert f"{key},(4-16),{size.mean().item()},{size.min().item()}" in lines


def test_merge_says_its_error_and_describes_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "new" / "both.safetensors"
    importlib.import_module("library.messages").log.propagate = True
    with caplog.at_level("INFO"):
        call("merge_lora", "merge", models=[A, B], ratios=[1.0, 0.5], save_to=str(target), save_precision="fp16")
    state, metadata = load_file(target), metadata_of(target)
    assert {value.dtype for value in state.values()} == {torch.float16}
    a, b = updates(load_file(A)), updates(load_file(B))
    measured = distance(updates({k: v.float() for k, v in state.items()}), {k: a[k] + 0.5 * b[k] for k in a})
    assert f"error: {100 * measured:.3g} %" in caplog.text
    assert metadata["modelspec.title"] == "both"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.merged_from"] == f"{Path(A).stem}, {Path(B).stem}"
    assert metadata["ss_base_model_version"] == "sd_v1"
    call("merge_lora", "merge", models=[A, B], ratios=[1.0, 0.5], save_to=str(target), no_metadata=True)
    assert not [key for key in metadata_of(target) if key.startswith("modelspec.")]


def test_one_network_alone_has_the_squared_effect_and_svd_merge_the_plain_one(tmp_path: Path) -> None:
    exact = updates(load_file(A))
    squared = tool("merge_lora").merge_lora_models([A], [-0.5], torch.float32)[0]
    assert distance(updates(squared), {k: -0.25 * v for k, v in exact.items()}) < 1e-6
    plain = tmp_path / "plain.safetensors"
    options = {"models": [A], "ratios": [-0.5], "new_rank": 4, "device": "cpu"}
    call("svd_merge_lora", "merge", save_to=str(plain), precision="fp16", save_precision="float", **options)
    found = updates(load_file(plain))
    assert distance(found, {k: -0.5 * v for k, v in exact.items()}) < 0.3  # only the clamp is between them
    assert metadata_of(plain)["ss_network_args"] == json.dumps({"conv_dim": 4, "conv_alpha": 4})


def test_both_styles_of_names_merge_to_the_usual_one(tmp_path: Path) -> None:
    state = load_file(SDXL)
    other = tmp_path / "other.safetensors"
    save_file(names.rename_unet(state, "diffusers", "sdxl"), other)
    assert any("down_blocks" in key for key in load_file(other))
    merged = tool("sdxl_merge_lora").merge_lora_models([SDXL, str(other)], [1.0, 0.0], torch.float32)[0]
    assert merged.keys() == state.keys()
    assert distance(updates(merged), updates(state)) < 1e-6


# Families and methods that do not fit


def test_mixed_families_are_named() -> None:
    with pytest.raises(UserError, match=r"a network for SDXL.*merge networks of one family"):
        open_networks([SD, SDXL])


def test_network_of_the_other_family(tmp_path: Path, tiny_sd15: Path) -> None:
    options = {"ratios": [1.0], "save_to": str(tmp_path / "x.safetensors")}
    with pytest.raises(UserError, match=r"a network for SDXL: use sdxl_merge_lora\.py"):
        call("merge_lora", "merge", models=[SDXL], sd_model=str(tiny_sd15), **options)
    with pytest.raises(UserError, match=r"SD 1.x.*use merge_lora\.py"):
        call("sdxl_merge_lora", "merge", models=[SD], **options)
    with pytest.raises(UserError, match=r"sd15\.safetensors"):
        call("sdxl_merge_lora", "merge", models=[SDXL], sd_model=str(tiny_sd15), **options)
    assert list(tmp_path.iterdir()) == []


def test_an_sdxl_network_merged_by_merge_lora_is_described_as_one(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    call("merge_lora", "merge", models=[SDXL], ratios=[1.0], save_to=str(target))
    assert metadata_of(target)["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("lora_unet_mid_block_x.hada_w1_a", "LoHa"),
        ("oft_unet_mid_block_x.oft_blocks", "OFT"),
        ("lllite_unet_x.down.0.weight", "LLLite"),
        ("model.diffusion_model.x.weight", "a whole model"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.mid_block.x.lora_A.weight", "convert_lora"),
    ],
)
def test_other_methods_are_refused(key: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2, 2)}, path)
    with pytest.raises(UserError, match=word):
        open_network(path)


def test_layers_of_other_sizes(tmp_path: Path) -> None:
    state = load_file(A)
    wider = {k: torch.cat([v, v], 1) if k.endswith("attn1_to_q.lora_down.weight") else v for k, v in state.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match=r"different sizes at lora_unet.*attn1_to_q"):
        tool("svd_merge_lora").merge_lora_models(
            [A, str(tmp_path / "wider.safetensors")], [1.0, 1.0], 4, 4, "cpu", torch.float32
        )


def test_oft_networks_have_no_sum(tmp_path: Path) -> None:
    path = tmp_path / "oft.safetensors"
    save_file({"oft_unet_input_blocks_1_1_x.oft_blocks": torch.zeros(2, 2, 2)}, path)
    with pytest.raises(UserError, match="--sd_model"):
        call("sdxl_merge_lora", "merge", models=[str(path)], ratios=[1.0], save_to=str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="OFT"):
        tool("sdxl_merge_lora").merge_lora_models([str(path)], [1.0], torch.float32)


# Into models


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_merged_model_equals_the_networks_own_merge(suffix: str, tmp_path: Path, tiny_sd15: Path) -> None:
    target, sd = tmp_path / f"merged.{suffix}", family("sd")
    call("merge_lora", "merge", sd_model=str(tiny_sd15), models=[SD], ratios=[0.8], save_to=str(target))
    merged, model = sd.load(target), sd.load(tiny_sd15)
    network, weights = lora.create_network_from_weights(
        0.8, SD, None, model.text_encoders, model.unet, for_inference=True
    )
    network.merge_to(model.text_encoders, model.unet, weights, torch.float32, "cpu")
    for ours, theirs in ((merged.unet, model.unet), (merged.text_encoders[0], model.text_encoders[0])):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-5, rtol=0)
    if suffix == "safetensors":
        metadata = metadata_of(target)
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
        assert metadata["modelspec.merged_from"].startswith(f"{tiny_sd15.stem}, ")


def test_into_sdxl_and_out_again(tmp_path: Path, tiny_sdxl: Path) -> None:
    """What a LoRA adds to both text encoders and the U-Net is what extraction finds."""
    merged, extracted = tmp_path / "merged.safetensors", tmp_path / "extracted.safetensors"
    call("sdxl_merge_lora", "merge", sd_model=str(tiny_sdxl), models=[SDXL], ratios=[1.0], save_to=str(merged))
    assert metadata_of(merged)["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    exact = updates(load_file(SDXL))
    rank = max(module.rank for _, module in iterate_state(load_file(SDXL)))
    tool("extract_lora_from_models").svd(
        str(tiny_sdxl), str(merged), str(extracted), rank, sdxl=True, conv_dim=rank, clamp_quantile=1.0, min_diff=0.0
    )
    found = updates(load_file(extracted))
    assert any(name.startswith("lora_te2_") for name in found)
    assert distance(found, {name: exact[name] for name in exact if name in found}) < 1e-3
    metadata = metadata_of(extracted)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_block_strengths_into_sdxl(tiny_sdxl: Path) -> None:
    model = family("sdxl").load(tiny_sdxl)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    weights = json.dumps([0.0] * 12)
    tool("sdxl_merge_lora").merge_to_sd_model(*model.text_encoders, model.unet, [SDXL], [1.0], [weights], torch.float32)
    changed = {
        ".".join(key.split(".")[:2]) for key, v in model.unet.state_dict().items() if not torch.equal(v, before[key])
    }
    touched = {position_of(name) for name, _ in iterate_state(load_file(SDXL)) if "_unet_" in name}
    assert touched - {4 + 1, 5 + 1, 7 + 1, 8 + 1, 13, 14, 15, 16, 17, 18, 19} == {
        position_of("lora_unet_" + name.replace(".", "_") + "_0_x") for name in changed
    }


def test_oft_into_a_model_equals_its_own_merge(tmp_path: Path, tiny_sdxl: Path) -> None:
    xl = family("sdxl")
    model, other = xl.load(tiny_sdxl), xl.load(tiny_sdxl)
    network = oft.create_network(1.0, 2, 1e-2, None, model.text_encoders, model.unet)
    network.apply_to(model.text_encoders, model.unet, False, True)
    randomize(network)
    path = str(tmp_path / "oft.safetensors")
    network.save_weights(path, None, {})
    error = merge_opened(other.text_encoders, other.unet, open_sdxl_networks([path]), [1.0])
    assert error.relative < 1e-5
    with torch.no_grad():
        for adapter in network.adapters:
            layer = adapter.org_module_ref[0]
            layer.weight.copy_(adapter.merged_weight(layer.weight))
    changed = 0
    for key, value in xl.load(tiny_sdxl).unet.state_dict().items():
        ours, theirs = other.unet.state_dict()[key], model.unet.state_dict()[key]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        changed += not torch.equal(ours, value)
    assert changed == len(network.adapters)


def test_extraction_refuses_models_that_do_not_match(tmp_path: Path, tiny_sd15: Path, tiny_sdxl: Path) -> None:
    options = {"model_org": str(tiny_sd15), "save_to": str(tmp_path / "x.safetensors")}
    with pytest.raises(UserError, match="give --sdxl"):
        call("extract_lora_from_models", "svd", model_tuned=str(tiny_sdxl), **options)
    with pytest.raises(UserError, match="leave one out"):
        call("extract_lora_from_models", "svd", model_tuned=str(tiny_sdxl), v2=True, sdxl=True, **options)


def test_extraction_leaves_equal_text_encoders_out(tmp_path: Path, tiny_sd21: Path) -> None:
    target = tmp_path / "x.safetensors"
    call(
        "extract_lora_from_models",
        "svd",
        model_org=str(tiny_sd21),
        model_tuned=str(tiny_sd21),
        save_to=str(target),
        v2=True,
        load_precision="bf16",
    )
    state = load_file(target)
    assert state and not [key for key in state if key.startswith("lora_te")]
    # projections of SD 2.x are 1x1 convolutions in network files
    assert state["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].dim() == 4
    assert metadata_of(target)["ss_base_model_version"] == "sd_v2_v"


# Resizing


def test_resize_of_peft_and_diffusers_names(tmp_path: Path) -> None:
    up, down = torch.randn(8, 6), torch.randn(6, 8)
    state = {"a.b.lora_A.weight": down, "a.b.lora_B.weight": up, "c.down.weight": down, "c.up.weight": up}
    found, old, _ = tool("resize_lora").resize_lora_model(state, 8, 8, torch.float32, "cpu", None, None, False)
    assert old == 6
    assert found.keys() == state.keys()
    for name in ("a.b.lora_A.weight", "c.down.weight"):
        other = name.replace("lora_A", "lora_B").replace("down", "up")
        assert found[name].shape == (8, 8)
        torch.testing.assert_close(found[other] @ found[name], up @ down)


def test_resize_with_a_rank_for_convolutions(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    call("resize_lora", "resize", model=A, save_to=str(target), new_rank=3, new_conv_rank=2, save_precision="bf16")
    for name, module in iterate_state(load_file(target)):
        assert module.rank == (2 if module.down.dim() == 4 else 3), name
    assert metadata_of(target)["ss_training_comment"] == "dimension is resized from 4 to 3 (conv: 2); hello"


# Block strengths


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", 0),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", 0),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 2),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", 4),
        ("lora_unet_down_blocks_2_resnets_1_conv1", 9),
        ("lora_unet_mid_block_attentions_0_proj_in", 13),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", 16),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", 25),
        ("lora_unet_input_blocks_4_1_proj_in", 5),
        ("lora_unet_middle_block_1_proj_in", 13),
        ("lora_unet_output_blocks_5_1_proj_in", 19),
        ("lora_unet_time_embed_0", 1),
        ("lora_unet_label_emb_0_0", 1),
        ("lora_unet_out_2", 23),
    ],
)
def test_positions(name: str, position: int) -> None:
    assert position_of(name) == position


def test_block_lists() -> None:
    assert parse_block_weights(None, 2) == [{}, {}]
    assert parse_block_weights([json.dumps(list(range(12)))], 1) == [
        dict(zip((0, 5, 6, 8, 9, 13, 14, 15, 16, 17, 18, 19), map(float, range(12)), strict=True))
    ]
    for texts, count in ((["[1]"], 1), (["[1]", "x"], 2), (["1,2"], 1), ([json.dumps([1] * 12)], 2)):
        with pytest.raises(UserError, match="--lbws"):
            parse_block_weights(texts, count)


def test_svd_merge_with_block_strengths() -> None:
    weights = [json.dumps([0.5] + [1.0] * 25)]
    exact = updates(load_file(A))
    state = tool("svd_merge_lora").merge_lora_models([A], [1.0], weights, 4, 4, "cpu", torch.float32)[0]
    plain = tool("svd_merge_lora").merge_lora_models([A], [1.0], 4, 4, "cpu", torch.float32)[0]
    text, same = updates(state), updates(plain)
    for name in exact:
        factor = 0.5 if "_te_" in name else 1.0
        assert text[name].norm() == pytest.approx((factor * same[name]).norm().item(), rel=0.2), name


# Old forms of calls


def test_save_to_file_takes_every_form(tmp_path: Path) -> None:
    save = tool("svd_merge_lora").save_to_file
    state, path = {"x": torch.ones(2)}, str(tmp_path / "x.safetensors")
    half = torch.float16
    for parts, dtype, text in (
        ((state, {"a": "b"}), torch.float32, "b"),
        ((state, half, {"a": "c"}), half, "c"),
        ((state, None, {"a": "d"}), torch.float32, "d"),
        ((state, state, half), half, None),
        ((state, state, half, {"a": "e"}), half, "e"),
    ):
        save(path, *parts)
        assert load_file(path)["x"].dtype == dtype
        assert metadata_of(Path(path)).get("a") == text


def test_load_state_dict() -> None:
    state, metadata = tool("merge_lora").load_state_dict(A, torch.bfloat16)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert metadata["ss_training_comment"] == "hello"


def test_resize_functions() -> None:
    resize = tool("resize_lora")
    weight = torch.randn(8, 4, 3, 3)
    parts = resize.extract_conv(weight, 8, None, None, "cpu")
    assert parts["new_rank"] == 8 and parts["lora_up"].shape == (8, 8, 1, 1)
    torch.testing.assert_close(resize.merge_conv(parts["lora_down"], parts["lora_up"], "cpu"), weight)
    parts = resize.extract_linear(weight.flatten(1), 2, "sv_ratio", 1e6, "cpu", 0.5)
    assert parts["new_rank"] == 2 and parts["new_alpha"] == 1.0
    assert resize.merge_linear(parts["lora_down"], parts["lora_up"], "cpu").shape == (8, 36)
