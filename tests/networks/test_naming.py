"""Names of network files in every form: exact inverses over the full-size key lists, and files converted and read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.messages import UserError
from library.models.dimensions import TextDimensions
from library.models.family import family
from library.models.text_encoders import PROJECTING, empty_text_encoder, text_config
from library.models.unet_sd import from_config
from library.models.unet_sdxl import SdxlUNet2DConditionModel
from library.options.network_convert import NetworkConvertConfig
from networks import converting, diffusers_format, dylora, lora, lora_fa, names
from networks.files import group_by_module
from tests.networks.network_models import FULL_TEXT, FULL_UNETS, predict, randomize, small_text_encoder, small_unet


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((golden / "networks_keys.json.gz").read_bytes()))["networks"]


def file_of(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A file with a recorded key list, on the meta device; alphas are numbers."""
    weights = {}
    for name, shapes in case["modules"]:
        for key, shape in shapes.items():
            weights[f"{name}.{key}"] = torch.tensor(2.0) if key == "alpha" else torch.zeros(shape, device="meta")
    return weights


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in weights.items()}


def test_paths_come_back_from_names() -> None:
    """Every module of every full-size model, in both styles of U-Net names."""
    with torch.device("meta"):
        models = [from_config(FULL_UNETS["sd21"]), SdxlUNet2DConditionModel()]
        models.append(empty_text_encoder(text_config(FULL_TEXT["sd15"])))
        models.append(empty_text_encoder(text_config(TextDimensions(1280, 2, 5120, projection=1280), PROJECTING)))
    wrong = []
    for model in models:
        paths = [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        assert len(paths) > 10
        wrong += [path for path in paths if names.dotted(path.replace(".", "_")) != path]
    assert not wrong


@pytest.mark.parametrize("case", ["sd15/lora_conv", "sd21/lora_conv", "sdxl/lora_conv", "sdxl/oft_all_linear_conv"])
def test_styles_of_unet_names_are_exact_inverses(recorded: dict[str, Any], case: str) -> None:
    weights = file_of(recorded[case])
    own, other = ("stability", "diffusers") if case.startswith("sdxl") else ("diffusers", "stability")
    kind = "sdxl" if case.startswith("sdxl") else "sd"
    there = names.rename_unet(weights, other, kind)
    assert not [key for key in there if "_unet_" in key and names.style_of((key,)) != other]
    assert list(names.rename_unet(there, own, kind)) == list(weights)
    assert names.convert_if_needed(there, [key.split("_unet_")[1] for key in weights if "_unet_" in key]).keys() == (
        weights.keys()
    )


@pytest.mark.parametrize("case", ["sd15/lora_linear", "sd15/lora_conv", "sd21/lora_conv", "sdxl/lora_conv"])
def test_diffusers_form_is_an_exact_inverse(recorded: dict[str, Any], case: str) -> None:
    weights = file_of(recorded[case])
    there, settings = diffusers_format.from_kohya(weights)
    assert len(there) == 2 * len(recorded[case]["modules"])
    assert all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in there)
    back = diffusers_format.to_kohya(there, {diffusers_format.METADATA_KEY: json.dumps(settings)})
    assert shapes_of(back) == shapes_of(weights)
    assert all(float(back[key]) == 2.0 for key in back if key.endswith(".alpha"))


def test_old_suffixes_of_diffusers() -> None:
    up, down = torch.zeros(4, 2), torch.zeros(2, 4)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    weights = {
        f"unet.{path}.processor.to_q_lora.down.weight": down,
        f"unet.{path}.processor.to_q_lora.up.weight": up,
        f"unet.{path}.processor.to_out_lora.down.weight": down,
        f"unet.{path}.processor.to_out_lora.up.weight": up,
        f"unet.{path}.to_k.lora.down.weight": down,
        f"unet.{path}.to_k.lora.up.weight": up,
        f"unet.{path}.to_k.alpha": torch.tensor(1.0),
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": down,
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": up,
    }
    found = diffusers_format.to_kohya(weights)
    start = f"lora_unet_{path.replace('.', '_')}"
    modules = [f"{start}_to_q", f"{start}_to_out_0", f"{start}_to_k"]
    modules.append("lora_te_text_model_encoder_layers_0_self_attn_q_proj")
    assert list(group_by_module(found)) == modules
    assert [float(found[f"{module}.alpha"]) for module in modules] == [2.0, 2.0, 1.0, 2.0]


def trained(tmp_path: Path, module: Any = lora, **arguments: str) -> tuple[Path, torch.Tensor]:
    """A file of a network with random values, and what the U-Net gives with it."""
    text_encoder, unet = small_text_encoder(), small_unet()
    network = module.create_network(1.0, 4, 2.0, None, text_encoder, unet, **arguments)
    network.apply_to(text_encoder, unet, True, True)
    randomize(network)
    network.eval()
    file = tmp_path / "kohya.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": module.__name__})
    with torch.no_grad():
        return file, predict(unet)


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya_stability_names", "kohya"])
@pytest.mark.parametrize("module", [lora, lora_fa, dylora])
def test_every_form_is_read(tmp_path: Path, form: str, module: Any) -> None:
    """A converted file gives the same outputs as network of a picture run and as start of a training, and returns."""
    arguments = {"conv_dim": "4"} if module is dylora else {"conv_dim": "2", "conv_alpha": "1.5"}
    file, expected = trained(tmp_path, module, **arguments)
    target = tmp_path / ("folder" if form == "peft" else "converted.safetensors")
    converting.convert_file(NetworkConvertConfig(model=str(file), save_to=str(target), to=form))
    back = tmp_path / "back.safetensors"
    converting.convert_file(NetworkConvertConfig(model=str(target), save_to=str(back), to="kohya"))
    first, last = load_file(file), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    if form == "peft":
        return
    for for_inference in (True, False):
        text_encoder, unet = small_text_encoder(), small_unet()
        network, weights = module.create_network_from_weights(
            1.0, str(target), None, text_encoder, unet, for_inference=for_inference
        )
        network.apply_to(text_encoder, unet, True, True)
        if for_inference:
            assert not network.load_state_dict(weights, False).unexpected_keys
        else:
            assert not network.load_weights(str(target)).missing_keys
        network.eval()
        with torch.no_grad():
            torch.testing.assert_close(predict(unet), expected, atol=1e-5, rtol=1e-5)


def test_metadata_travel(tmp_path: Path) -> None:
    file, _ = trained(tmp_path)
    target, back = tmp_path / "d.safetensors", tmp_path / "b.safetensors"
    converting.convert_file(NetworkConvertConfig(model=str(file), save_to=str(target), to="diffusers"))
    converting.convert_file(NetworkConvertConfig(model=str(target), save_to=str(back)))

    def metadata(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as opened:
            return opened.metadata()

    assert metadata(back) == metadata(file)
    assert metadata(target)["ss_network_module"] == "networks.lora"
    assert json.loads(metadata(target)[diffusers_format.METADATA_KEY])["unet.lora_alpha"] == 2.0


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"oft_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.zeros(2, 4, 4)}, "OFT"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(2, 4)}, "LoHa"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 4)}, "incomplete"),
        ({"unet.a.lora_A.weight": torch.zeros(2, 4), "unet.b.weight": torch.zeros(2)}, "no.*plain LoRA"),
        ({"something": torch.zeros(2)}, "no network"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    options = NetworkConvertConfig(
        model=str(tmp_path / "a.safetensors"), save_to=str(tmp_path / "b.safetensors"), to="diffusers"
    )
    with pytest.raises(UserError, match=words):
        converting.convert_file(options)
    assert not (tmp_path / "b.safetensors").exists()


def test_sdxl_files_of_later_callers() -> None:
    """`convert_diffusers_to_sai_if_needed` of later releases renames in place."""
    key = "lora_unet_up_blocks_0_attentions_1_transformer_blocks_3_attn2_to_k.lora_up.weight"
    weights = {key: torch.zeros(1), "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(1)}
    assert lora.convert_diffusers_to_sai_if_needed(weights) is None
    assert list(weights) == [
        "lora_unet_output_blocks_1_1_transformer_blocks_3_attn2_to_k.lora_up.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    ]


def test_sdxl_file_in_diffusers_names(tiny_sdxl: Path, tmp_path: Path) -> None:
    """The same network in both styles of names gives the same U-Net."""
    model = family("sdxl").load(tiny_sdxl)
    network = lora.create_network(1.0, 2, 1.0, None, model.text_encoders, model.unet, conv_dim="2")
    network.apply_to(model.text_encoders, model.unet, True, True)
    randomize(network)
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    network.save_weights(str(own), None, {})
    for form in ("kohya_diffusers_names", "diffusers"):
        converting.convert_file(NetworkConvertConfig(model=str(own), save_to=str(other), to=form))
        fresh = family("sdxl").load(tiny_sdxl)
        again, weights = lora.create_network_from_weights(
            1.0, str(other), None, fresh.text_encoders, fresh.unet, for_inference=True
        )
        again.apply_to(fresh.text_encoders, fresh.unet)
        again.load_state_dict(weights, True)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
