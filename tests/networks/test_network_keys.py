"""Key lists of full-size networks: names, shapes and order of every method on every family."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.models.dimensions import TextDimensions
from library.models.text_encoders import PROJECTING, empty_text_encoder, text_config
from library.models.unet_sd import from_config
from library.models.unet_sdxl import SdxlUNet2DConditionModel
from networks import dylora, lora, lora_fa, oft
from tests.networks.network_models import FULL_TEXT, FULL_UNETS

# Cases whose module comes with ControlNet.
LATER = {"sdxl/lllite": "ControlNet-LLLite"}
# kind -> module, the arguments that make it, keys of a module in order
LOW_RANK = ("alpha", "lora_down.weight", "lora_up.weight")
ROTATION = ("oft_blocks", "alpha")
ALL_LINEAR, CONV = {"enable_all_linear": "True"}, {"enable_conv": "1"}
KINDS: dict[str, tuple[Any, dict[str, str], tuple[str, ...]]] = {
    "lora_linear": (lora, {}, LOW_RANK),
    "lora_conv": (lora, {"conv_dim": "8"}, LOW_RANK),
    "lora_fa_linear": (lora_fa, {}, LOW_RANK),
    "dylora_linear": (dylora, {}, LOW_RANK),
    "dylora_conv": (dylora, {"conv_dim": "4", "unit": "2"}, LOW_RANK),
    "oft_attn": (oft, {}, ROTATION),
    "oft_all_linear": (oft, ALL_LINEAR, ROTATION),
    "oft_conv": (oft, {**CONV, "enable_all_linear": "False"}, ROTATION),
    "oft_all_linear_conv": (oft, {**ALL_LINEAR, **CONV}, ROTATION),
}
SDXL_TEXT = TextDimensions(1280, 32, 5120, activation="gelu", projection=1280)


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((golden / "networks_keys.json.gz").read_bytes()))["networks"]


CASES = [
    "sd15/lora_fa_linear",
    "sd15/dylora_linear",
    "sd15/dylora_conv",
    *(
        f"{model}/{kind}"
        for model in (*FULL_UNETS, "sdxl")
        for kind in KINDS
        if kind.startswith(("lora_l", "lora_c", "oft"))
    ),
]


def models(name: str) -> tuple[Any, nn.Module]:
    """Full-size text encoder(s) and U-Net without memory."""
    with torch.device("meta"):
        if name != "sdxl":
            return empty_text_encoder(text_config(FULL_TEXT[name])), from_config(FULL_UNETS[name])
        encoders = [empty_text_encoder(text_config(FULL_TEXT["sd15"]))]
        encoders.append(empty_text_encoder(text_config(SDXL_TEXT, PROJECTING)))
        return encoders, SdxlUNet2DConditionModel()


def listed(network: nn.Module) -> list[Any]:
    """[[name, {suffix: shape}], ...] in the order of the file."""
    found: dict[str, dict[str, list[int]]] = {}
    for key, tensor in network.file_state().items():
        name, _, suffix = key.partition(".")
        found.setdefault(name, {})[suffix] = list(tensor.shape)
    return [[name, shapes] for name, shapes in found.items()]


def test_every_case_has_its_place(recorded: dict[str, Any]) -> None:
    assert set(CASES) | LATER.keys() == recorded.keys()
    assert len(CASES) == len(set(CASES))


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_order(recorded: dict[str, Any], case: str) -> None:
    model, _, kind = case.partition("/")
    module, arguments, keys = KINDS[kind]
    text_encoder, unet = models(model)
    with torch.device("meta"):
        network = module.create_network(1.0, 4, 1.0, None, text_encoder, unet, **arguments)
    assert len(network.text_encoder_loras) == recorded[case]["text_encoder"]
    assert len(network.unet_loras) == recorded[case]["unet"]
    assert network.state_dict() == {}
    network.apply_to(text_encoder, unet, True, True)
    found = listed(network)
    assert found == recorded[case]["modules"]
    assert {tuple(shapes) for _, shapes in found} == {keys}


@pytest.mark.parametrize("kind", ["oft_attn", "oft_all_linear", "oft_conv", "oft_all_linear_conv"])
def test_oft_files_say_their_targets(recorded: dict[str, Any], kind: str) -> None:
    """From the names of a file come the layers that it was trained on, convolutions included."""
    for model in ("sd15", "sdxl"):
        expected = recorded[f"{model}/{kind}"]["modules"]
        weights = {
            f"{name}.{key}": torch.zeros(shape, device="meta" if key == "oft_blocks" else "cpu")
            for name, shapes in expected
            for key, shape in shapes.items()
        }
        text_encoder, unet = models(model)
        with torch.device("meta"):
            network, _ = oft.create_network_from_weights(1.0, None, None, text_encoder, unet, weights)
        assert [adapter.lora_name for adapter in network.unet_loras] == [name for name, _ in expected]
