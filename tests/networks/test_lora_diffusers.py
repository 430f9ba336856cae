"""The stand-alone helper for diffusers pipelines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.models.family import family
from networks import lora, lora_diffusers
from tests.conftest import REFERENCE

ROOT = Path(__file__).parent.parent.parent
DATA = REFERENCE / "generation" / "data"


def test_a_single_copied_file_works(tmp_path: Path) -> None:
    shutil.copy(ROOT / "networks" / "lora_diffusers.py", tmp_path)
    code = (
        "import lora_diffusers, sys; assert not {'library', 'networks'} & set(sys.modules); lora_diffusers.LoRANetwork"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_sdxl: Path) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    root = tmp_path_factory.mktemp("pipelines")
    result = {}
    for name, path, kind in (
        ("sd", tiny_sd15, StableDiffusionPipeline),
        ("sdxl", tiny_sdxl, StableDiffusionXLPipeline),
    ):
        family(name).save(family(name).load(path), root / name, stability_layout=False)
        options = {} if name == "sdxl" else {"safety_checker": None}
        result[name] = kind.from_pretrained(root / name, local_files_only=True, **options)
    return result


def predict(name: str, unet: Any) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    more = {}
    if name == "sdxl":
        width = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        more = {"added_cond_kwargs": {"text_embeds": torch.ones(1, width), "time_ids": torch.ones(1, 6) * 64}}
    with torch.no_grad():
        return unet(latents, torch.tensor(300), text, **more).sample


def networks_of(name: str, pipe: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    weights = load_file(DATA / {"sd": "lora_a_sd15.safetensors", "sdxl": "lora_sdxl.safetensors"}[name])
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if name == "sdxl" else pipe.text_encoder
    network = lora_diffusers.create_network_from_weights(encoders, pipe.unet, weights)
    network.load_state_dict(weights)
    return network, weights


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_apply_take_off_merge_restore(name: str, pipelines: dict[str, Any]) -> None:
    unet = pipelines[name].unet
    plain = predict(name, unet)
    network, weights = networks_of(name, pipelines[name])
    assert len(network.loras) == len([key for key in weights if "lora_down" in key])
    network.apply_to(0.7)
    applied = predict(name, unet)
    assert (applied - plain).abs().max() > 1e-3
    network.unapply_to()
    assert torch.equal(predict(name, unet), plain)
    network.merge_to(0.7)
    torch.testing.assert_close(predict(name, unet), applied, atol=1e-4, rtol=1e-4)
    network.restore_from(0.7)
    torch.testing.assert_close(predict(name, unet), plain, atol=1e-4, rtol=1e-4)


def test_merged_pipeline_equals_our_merge(pipelines: dict[str, Any], tiny_sd15: Path) -> None:
    pipe = pipelines["sd"]
    file = str(DATA / "lora_a_sd15.safetensors")
    model = family("sd").load(tiny_sd15)
    encoders = model.text_encoders
    network, weights = lora.create_network_from_weights(0.5, file, None, encoders, model.unet, for_inference=True)
    network.merge_to(encoders, model.unet, weights)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    keys = list(weights)
    lora_diffusers.merge_lora_weights(pipe, weights, 0.5)
    assert list(weights) == keys
    for key, value in model.unet.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[key].view(value.shape), value, atol=1e-5, rtol=0)
    pipe.unet.load_state_dict(before)


def test_names() -> None:
    weights = {"lora_unet_input_blocks_4_1_proj_in.alpha": torch.tensor(1.0), "lora_te1_x.alpha": torch.tensor(1.0)}
    converted = lora_diffusers.convert_unet_names(weights)
    assert list(converted) == ["lora_unet_down_blocks_1_attentions_0_proj_in.alpha", "lora_te1_x.alpha"]
    assert lora_diffusers.convert_unet_names(converted) == converted
    with pytest.raises(AssertionError, match="1 of 2"):
        lora_diffusers.convert_unet_names({**weights, "lora_unet_up_blocks_0_x.alpha": torch.tensor(1.0)})


def test_modules_without_a_layer_are_named(pipelines: dict[str, Any]) -> None:
    weights = {"lora_unet_mid_block_nothing.lora_down.weight": torch.zeros(1, 2)}
    with pytest.raises(AssertionError, match="mid_block_nothing"):
        lora_diffusers.create_network_from_weights(pipelines["sd"].text_encoder, pipelines["sd"].unet, weights)
