"""LoRA-FA, DyLoRA and OFT modules against recorded inputs and outputs of the original."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from networks import dylora, lora, lora_fa, oft
from tests.networks.network_models import make_layer

CLOSE = {"atol": 1e-5, "rtol": 0}


def cases_of(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Case name -> its tensors, names within the case."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        match = re.match(r"^(linear|conv1|conv3)\.(.*?)\.((?:[a-zA-Z]\w*\.?)+(?:\.\d+)?)$", key)
        assert match, key
        cases.setdefault(f"{match[1]}.{match[2]}", {})[match[3]] = tensor
    return cases


def test_lora_fa(golden: Path) -> None:
    tensors = load_file(golden / "networks_lora_lora_fa.safetensors")
    layer = make_layer("linear", tensors)
    torch.manual_seed(11)
    module = lora_fa.LoRAModule("lora_unet_x", layer, 1.0, 4, tensors["alpha"])
    assert torch.equal(module.lora_down.weight, tensors["init.lora_down.weight_seed11"])
    module.load_state_dict({k: v for k, v in tensors.items() if k.startswith(("lora_", "alpha"))}, strict=False)
    module.apply_to()
    torch.testing.assert_close(layer(tensors["x"]), tensors["y"], **CLOSE)


def test_lora_fa_trains_the_up_matrices_only(golden: Path) -> None:
    """The recorded run gives the optimizer 18 tensors but calls all 36 trainable: a fault that is not repeated."""
    recorded = json.loads((golden / "networks_blocks.json").read_text(encoding="utf-8"))["lora_fa"]
    assert recorded["trainable_params_from_network"] == 2 * recorded["tensors_given_to_optimizer"]
    assert recorded["lora_down_requires_grad"]
    count = recorded["tensors_given_to_optimizer"]
    network = lora_fa.LoRANetwork(None, nn.Identity())
    network.unet_loras = [lora_fa.LoRAModule(f"lora_unet_{i}", nn.Linear(4, 4)) for i in range(count)]
    network.apply_to(None, None, True, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-3, None)
    network.prepare_grad_etc(None, None)
    ups = [adapter.lora_up.weight for adapter in network.unet_loras]
    for found in (groups[0]["params"], list(network.get_trainable_params())):
        assert len(found) == count
        assert all(a is b for a, b in zip(found, ups, strict=True))
    assert not any(adapter.lora_down.weight.requires_grad for adapter in network.unet_loras)


def test_dylora(golden: Path) -> None:
    cases = cases_of(golden / "networks_lora_dylora.safetensors")
    assert len(cases) == 9
    for name, tensors in cases.items():
        kind, unit = re.fullmatch(r"(\w+)\.u(\d)", name).groups()
        layer = make_layer(kind, tensors)
        module = dylora.DyLoRAModule("lora_unet_x", layer, 0.5, 8, tensors["alpha"], unit=int(unit))
        state = {k.removeprefix("lora_unet_x."): v for k, v in tensors.items() if k.startswith("lora_unet_x.")}
        module.load_state_dict({**state, "alpha": tensors["alpha"]}, strict=False)
        for side, pieces in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            assert all(torch.equal(piece, tensors[f"{side}.{i}"]) for i, piece in enumerate(pieces)), name
        saved = module.state_dict()
        assert list(saved) == ["alpha", "lora_down.weight", "lora_up.weight"]
        assert all(torch.equal(saved[key], value) for key, value in state.items()), name
        module.apply_to()
        module.train()
        for key, expected in tensors.items():
            if key.startswith("y_seed"):
                random.seed(int(key.removeprefix("y_seed")))
                torch.testing.assert_close(layer(tensors["x"]), expected, **CLOSE, msg=f"{name} {key}")
        plain_layer = make_layer(kind, tensors)
        plain = lora.LoRAModule("lora_unet_x", plain_layer, 0.5, 8, tensors["alpha"])
        plain.load_state_dict({**state, "alpha": tensors["alpha"]}, strict=False)
        plain.apply_to()
        module.eval()
        torch.testing.assert_close(layer(tensors["x"]), plain_layer(tensors["x"]), **CLOSE, msg=f"{name}: full rank")


def test_oft(golden: Path) -> None:
    """`y` was recorded with the bias rotated, a fault; `y_merged` is what forward and merging give now."""
    cases = cases_of(golden / "networks_lora_oft.safetensors")
    assert len(cases) == 6
    for name, tensors in cases.items():
        kind, multiplier = re.fullmatch(r"(\w+)\.c[\d.]+\.m([\d.]+)", name).groups()
        layer = make_layer(kind, tensors)
        module = oft.OFTModule("oft_unet_x", layer, float(multiplier), 2, tensors["alpha"])
        module.load_state_dict({"oft_blocks": tensors["oft_blocks"], "alpha": tensors["alpha"]}, strict=False)
        torch.testing.assert_close(module.get_weight(), tensors["R"], **CLOSE, msg=f"{name} R")
        torch.testing.assert_close(module.merged_weight(layer.weight), tensors["merged"], **CLOSE, msg=name)
        module.apply_to()
        y = layer(tensors["x"])
        torch.testing.assert_close(y, tensors["y_merged"], **CLOSE, msg=f"{name} y")
        rotated_bias = layer.bias @ tensors["R"] - layer.bias
        shape = (-1, 1, 1) if kind != "linear" else (-1,)
        torch.testing.assert_close(y + rotated_bias.view(shape), tensors["y"], **CLOSE, msg=f"{name} recorded y")

        other = make_layer(kind, tensors)  # the slower path, over another network
        other.forward = lambda x, forward=other.forward: forward(x)
        second = oft.OFTModule("oft_unet_x", other, float(multiplier), 2, tensors["alpha"])
        second.load_state_dict(module.state_dict(), strict=False)
        second.apply_to()
        torch.testing.assert_close(other(tensors["x"]), tensors["y_merged"], **CLOSE, msg=f"{name} y over another")


@pytest.mark.parametrize("multiplier", [0.0, 0.6])
def test_oft_identity(multiplier: float) -> None:
    """New blocks are zero: no rotation, at any strength."""
    layer = nn.Linear(6, 8)
    x = torch.randn(3, 6)
    before = layer(x)
    oft.OFTModule("oft_unet_x", layer, multiplier, 4).apply_to()
    torch.testing.assert_close(layer(x), before)
