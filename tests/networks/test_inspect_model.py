"""What `tools/inspect_model.py` says of models of every family and of network files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.messages import UserError
from library.models.converting import convert_model
from library.options.model_tools import ModelConvertConfig
from library.options.parser import build_parser
from tools.inspect_model import SCRIPT, inspect

FAMILIES = {
    "tiny_sd15": "Stable Diffusion 1.x",
    "tiny_sd21": "Stable Diffusion 2.x",
    "tiny_sdxl": "Stable Diffusion XL",
}


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]):
    def ask(path: Path) -> dict:
        inspect(build_parser(SCRIPT).parse_args([str(path), "--json"]))
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_whole_models(name: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path, facts) -> None:
    path = request.getfixturevalue(name)
    if layout == "folder":
        convert_model(ModelConvertConfig(model_to_load=str(path), model_to_save=str(tmp_path / "f"), bf16=True))
        path = tmp_path / "f"
    said = facts(path)
    assert (said["family"], said["missing"], said["extra"]) == (FAMILIES[name], [], [])
    assert ("folder" in said["layout"]) == (layout == "folder")
    if layout == "folder":
        assert list(said["number_formats"]) == ["bfloat16"]
        assert said["prediction_type"] == ("v_prediction" if name == "tiny_sd21" else "epsilon")
    assert said["dimensions"]["U-Net"]["parameters"] > 1000
    assert said["dimensions"]["VAE"]["latent_channels"] == 4
    assert len(said["dimensions"]) == (4 if name == "tiny_sdxl" else 3)


def test_missing_and_extra_tensors(tiny_sd15: Path, tmp_path: Path, facts) -> None:
    state = load_file(tiny_sd15) | {"model_ema.decay": torch.zeros(1), "v_pred": torch.empty(0)}
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, tmp_path / "a.safetensors")
    said = facts(tmp_path / "a.safetensors")
    assert said["missing"] == ["model.diffusion_model.out.2.bias"]
    assert sorted(said["extra"]) == ["model_ema.decay", "v_pred"]
    assert said["prediction_type"] == "v_prediction"
    save_file({k: v for k, v in state.items() if not k.startswith("first_stage")}, tmp_path / "b.safetensors")
    assert facts(tmp_path / "b.safetensors")["missing"][0] == "the whole VAE"


def test_network(reference: Path, facts) -> None:
    said = facts(reference / "generation" / "data" / "lora_sdxl.safetensors")
    assert (said["method"], said["for"], said["rank"], said["alpha"]) == ("LoRA", "a network for SDXL", "2", "1")
    assert said["targets"] == {"first text encoder": 18, "second text encoder": 18, "U-Net": 192}
    assert (said["programs"]["ComfyUI"], said["programs"]["peft"]) == ("loads", "no")


def test_training_of_a_network(tmp_path: Path, facts) -> None:
    state = {}
    for name, rank in (("lora_unet_mid_block_attentions_0_proj_in", 4), ("lora_te_text_model_encoder", 8)):
        state |= {f"{name}.lora_down.weight": torch.zeros(rank, 6), f"{name}.lora_up.weight": torch.zeros(6, rank)}
    texts = {"ss_steps": "100", "ss_new_sd_model_hash": "abc", "ss_seed": "None", "sshs_model_hash": "123"}
    save_file(state, tmp_path / "n.safetensors", texts)
    said = facts(tmp_path / "n.safetensors")
    assert said["rank"] == "4 (1 modules), 8 (1 modules)"
    assert (said["training"], said["base_model"], said["hash"]) == ({"steps": "100"}, {"sha256": "abc"}, "123")
    assert said["targets"] == {"U-Net": 1, "text encoder": 1}


def test_for_a_reader(tiny_sd15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(build_parser(SCRIPT).parse_args([str(tiny_sd15)]))
    shown = capsys.readouterr().out
    assert "family: Stable Diffusion 1.x\n" in shown and "prediction type: not said\n" in shown
    assert "missing: none\n" in shown and "    U-Net:\n" in shown


def test_other_files_are_named(tmp_path: Path) -> None:
    save_file({"double_blocks.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="a FLUX model"):
        inspect(build_parser(SCRIPT).parse_args([str(tmp_path / "flux.safetensors")]))
    with pytest.raises(UserError, match="does not exist"):
        inspect(build_parser(SCRIPT).parse_args([str(tmp_path / "nothing")]))


@pytest.mark.parametrize(
    ("name", "method"),
    [("ti_sd1.pt", "embedding"), ("ti_sdxl.safetensors", "SDXL embedding"), ("xti.safetensors", "XTI embedding")],
)
def test_embeddings(name: str, method: str, golden: Path, facts) -> None:
    told = facts(golden / f"embeddings_file_{name}")
    assert told["method"] == method
    assert told["for"] == "an embedding"
