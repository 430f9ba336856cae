"""LoRA against recorded inputs and outputs of the original: names, shapes, forwards, merges, norms, files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.models.hashes import network_hashes
from library.models.text_encoders import empty_text_encoder, text_config
from library.models.unet_sd import from_config
from networks import blocks, lora
from tests.networks.network_models import FULL_TEXT, FULL_UNETS, make_layer

# Whole files whose methods and tools come later.
LATER_FILES = {
    "networks_lora_lllite.safetensors": "ControlNet-LLLite",
    "networks_lora_hypernetwork.safetensors": "hypernetworks",
}
NOW_FILES = {
    "networks_blocks.json",
    "networks_hash.json",
    "networks_keys.json.gz",
    "networks_lora_lora.safetensors",
    "networks_lora_lora_fa.safetensors",
    "networks_lora_dylora.safetensors",
    "networks_lora_oft.safetensors",
    "networks_lora_maxnorm_before.safetensors",
    "networks_lora_maxnorm_after.safetensors",
}


def read_keys(golden: Path) -> dict:
    return json.loads(gzip.decompress((golden / "networks_keys.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def recorded_blocks(golden: Path) -> dict:
    return json.loads((golden / "networks_blocks.json").read_text(encoding="utf-8"))


def full_models(name: str, text_layers: int | None = None) -> tuple[nn.Module, nn.Module]:
    """Full-size text encoder and U-Net without memory."""
    config = text_config(FULL_TEXT[name])
    if text_layers is not None:
        config["num_hidden_layers"] = text_layers
    with torch.device("meta"):
        return empty_text_encoder(config), from_config(FULL_UNETS[name])


def test_every_golden_file_has_its_place(golden: Path) -> None:
    present = {path.name for path in golden.glob("networks_*") if not path.name.startswith("networks_tools")}
    assert present == NOW_FILES | LATER_FILES.keys()


def test_a_convolution_network_leaves_later_networks_alone(golden: Path) -> None:
    """The recorded `linear_after_conv_in_same_process` is a fault (228 modules): class lists are never changed."""
    recorded = read_keys(golden)["linear_after_conv_in_same_process"]
    assert recorded["unet"] == 228
    text_encoder, unet = full_models("sd15", text_layers=1)
    with torch.device("meta"):
        lora.create_network(1.0, 4, 1.0, None, text_encoder, unet, conv_dim="4")
        after = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    names = {module.lora_name for module in after.unet_loras}
    assert len(names) == 192
    assert not names & set(recorded["extra"])


def cases_of(golden: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Case name -> its tensors."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    pattern = re.compile(r"^(.*?)\.((?:org|lora_down|lora_up)\.\w+|alpha|x|y|y_seed\d+|delta|merged)$")
    for key, tensor in load_file(golden / "networks_lora_lora.safetensors").items():
        match = pattern.match(key)
        assert match, key
        cases.setdefault(match[1], {})[match[2]] = tensor
    return cases


def load_values(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({k: v for k, v in tensors.items() if k.startswith("lora_")}, strict=False)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["fused", "general"])
@pytest.mark.parametrize("module_class", [lora.LoRAModule, lora.LoRAInfModule])
def test_forward_delta_and_merge(golden: Path, module_class: type, requires_grad: bool) -> None:
    cases = {name: tensors for name, tensors in cases_of(golden).items() if not name.startswith("drop.")}
    assert len(cases) == 6
    for name, tensors in cases.items():
        match = re.fullmatch(r"(\w+)\.a([\d.]+)\.m([-\d.]+)", name)
        assert match, name
        layer = make_layer(match[1], tensors).requires_grad_(requires_grad)
        rank = tensors["lora_down.weight"].shape[0]
        module = module_class("lora_unet_x", layer, float(match[3]), rank, float(match[2]))
        load_values(module, tensors)
        assert torch.equal(module.alpha, tensors["alpha"])
        module.apply_to()
        torch.testing.assert_close(layer(tensors["x"]), tensors["y"], atol=1e-5, rtol=0)
        torch.testing.assert_close(module.get_weight(), tensors["delta"], atol=1e-5, rtol=0)
        module.merge_to(
            {"lora_up.weight": module.lora_up.weight, "lora_down.weight": module.lora_down.weight}, None, None
        )
        torch.testing.assert_close(layer.weight.detach(), tensors["merged"], atol=1e-5, rtol=0)


def test_dropouts(golden: Path) -> None:
    cases = {name: tensors for name, tensors in cases_of(golden).items() if name.startswith("drop.")}
    assert len(cases) == 8
    for name, tensors in cases.items():
        kind, settings = name.split(".", 2)[1:]
        chances = {
            key: float(value)
            for key, value in re.findall(r"(?:^|_)(dropout|rank_dropout|module_dropout)([\d.]+)", settings)
        }
        layer = make_layer(kind, tensors)
        module = lora.LoRAModule("lora_unet_x", layer, 1.0, 4, 2.0, **chances)
        load_values(module, tensors)
        module.apply_to()
        module.train()
        for key, expected in tensors.items():
            if key.startswith("y_seed"):
                torch.manual_seed(int(key.removeprefix("y_seed")))
                torch.testing.assert_close(layer(tensors["x"]), expected, atol=1e-5, rtol=0, msg=f"{name} {key}")


def test_weight_norm_cap(golden: Path, recorded_blocks: dict) -> None:
    before = load_file(golden / "networks_lora_maxnorm_before.safetensors")
    after = load_file(golden / "networks_lora_maxnorm_after.safetensors")
    expected = recorded_blocks["max_norm"]
    network = lora.LoRANetwork(None, nn.Identity())
    for name in dict.fromkeys(key.split(".")[0] for key in before):
        up, down = before[f"{name}.lora_up.weight"], before[f"{name}.lora_down.weight"]
        if down.dim() == 4:
            layer: nn.Module = nn.Conv2d(down.shape[1], up.shape[0], down.shape[2:], padding=down.shape[2] // 2)
        else:
            layer = nn.Linear(down.shape[1], up.shape[0])
        module = lora.LoRAModule(name, layer, 1.0, down.shape[0], before[f"{name}.alpha"])
        network.unet_loras.append(module)
    network.apply_to(None, None, True, True)
    network.load_state_dict(before)
    scaled, mean, largest = network.apply_max_norm_regularization(expected["max_norm_value"], "cpu")
    assert len(network.unet_loras) == expected["modules"]
    assert int(scaled) == expected["keys_scaled"]
    assert float(mean) == pytest.approx(expected["mean_norm"], abs=1e-6)
    assert float(largest) == pytest.approx(expected["max_norm"], abs=1e-6)
    state = network.state_dict()
    assert list(state) == list(network.state_dict())
    assert state.keys() == after.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(state[key], tensor, atol=1e-6, rtol=1e-5, msg=key)


def test_hashes(golden: Path) -> None:
    cases = json.loads((golden / "networks_hash.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 5
    for case in cases:
        tensors = {}
        for key, entry in case["tensors"].items():
            data = entry["data"]
            if isinstance(data, str):
                assert data == "element i = i mod 1000"
                data = [i % 1000 for i in range(entry["shape"][0])]
            tensors[key] = torch.tensor(data).to(getattr(torch, entry["dtype"])).reshape(entry["shape"])
        hashes = network_hashes(tensors, case["metadata"])
        assert hashes == (case["sshs_model_hash"], case["sshs_legacy_hash"]), case["name"]


# Block functions. Recorded crashes (TypeError, AssertionError) are faults or bad input: see each test.


def test_block_index(recorded_blocks: dict) -> None:
    wrong = {}
    for model, names in recorded_blocks["block_index"].items():
        assert len(names) == {"sd15": 350, "sd21": 416, "sdxl": 1052}[model]
        wrong |= {name: index for name, index in names.items() if blocks.get_block_index(name) != index}
    assert not wrong


# Recorded as crashes; what happens now instead.
MENDED_WEIGHTS = {
    "1,1,1,1,1,1,1,1,1,1,1,1,1": [1.0] * 12,
    "0.5": [0.5] + [1.0] * 11,
    "unknown": None,
}


def test_block_lr_weights(recorded_blocks: dict) -> None:
    assert len(recorded_blocks["lr_weight"]) == 20
    for case in recorded_blocks["lr_weight"]:
        if "error" in case:
            given = case["args"]["down_lr_weight"]
            if MENDED_WEIGHTS[given] is None:
                with pytest.raises(ValueError, match=r"unknown.*reverse_linear"):
                    lora.parse_block_lr_kwargs(case["args"])
            else:
                assert lora.parse_block_lr_kwargs(case["args"]) == (MENDED_WEIGHTS[given], None, None)
            continue
        found = lora.parse_block_lr_kwargs(case["args"])
        for weights, side in zip(found, ("down", "mid", "up"), strict=True):
            expected = case[side]
            assert weights == (expected if expected is None else pytest.approx(expected, abs=1e-12)), case["args"]


def test_block_dims(recorded_blocks: dict) -> None:
    assert len(recorded_blocks["block_dims"]) == 8
    for case in recorded_blocks["block_dims"]:
        if "error" in case:
            with pytest.raises(ValueError, match=r"block_dims has 2 .* give 25"):
                lora.get_block_dims_and_alphas(*case["args"])
            continue
        found = lora.get_block_dims_and_alphas(*case["args"])
        if case["lr_weight"] != [None, None, None]:
            found = lora.remove_block_dims_and_alphas(*found, *case["lr_weight"])
        assert list(found) == [case[k] for k in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")]


def test_optimizer_groups(recorded_blocks: dict) -> None:
    cases = recorded_blocks["optimizer_groups_sd15_unet_one_layer_text_encoder"]
    assert len(cases) == 6
    for case in cases:
        text_encoder, unet = full_models("sd15", text_layers=1)
        with torch.device("meta"):
            network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet, **case["args"])
        network.apply_to(text_encoder, unet, True, True)
        groups, descriptions = network.prepare_optimizer_params(*case["text_encoder_lr,unet_lr,default_lr"])
        assert len(network.unet_loras) == case["unet_modules"], case["args"]
        found = [{"tensors": len(list(group["params"])), "lr": group.get("lr")} for group in groups]
        assert found == [
            {"tensors": g["tensors"], "lr": g["lr"] if g["lr"] is None else pytest.approx(g["lr"], rel=1e-12)}
            for g in case["groups"]
        ], case["args"]
        assert len(descriptions) == len(groups)
        assert descriptions[:2] == ["textencoder", "unet" if len(groups) == 2 else descriptions[1]]
