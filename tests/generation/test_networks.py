"""Networks for pictures: lists of the command line, loading, multipliers, pre-calculation, bad input."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.generation.engine import Engine
from library.generation.networks import (
    AppliedNetwork,
    Networks,
    check_networks,
    load_networks,
    network_specs,
    show_metadata,
)
from library.generation.request import ImageRequest
from library.messages import UserError
from library.models.family import LoadedModel, family


@pytest.fixture
def model(tiny_sd15: Path) -> LoadedModel:
    return family("sd").load(tiny_sd15)


@pytest.fixture
def lora(reference: Path) -> str:
    return str(reference / "generation" / "data" / "lora_a_sd15.safetensors")


def picture(model: LoadedModel, networks: Networks, multipliers: tuple[float, ...] | None = None) -> torch.Tensor:
    request = ImageRequest(prompt="a red circle", width=64, height=64, steps=2, seed=7, network_multipliers=multipliers)
    return Engine(family("sd"), model, sampler="euler", networks=networks).latents([request])


def test_short_lists() -> None:
    specs = network_specs(["m", "n"], ["a.safetensors", "b.safetensors"], [0.5], ["x=1;y=a=b"])
    assert [(spec.multiplier, spec.arguments) for spec in specs] == [(0.5, {"x": "1", "y": "a=b"}), (1.0, {})]


def test_bad_lists() -> None:
    with pytest.raises(UserError, match="2 network modules but 1"):
        network_specs(["m", "n"], ["a"], None, None)
    with pytest.raises(UserError, match="key=value"):
        network_specs(["m"], ["a"], None, ["novalue"])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none_such"):
        check_networks(network_specs(["none_such"], ["a"], None, None))
    with pytest.raises(UserError, match="not a network module"):
        check_networks(network_specs(["json"], ["a"], None, None))
    with pytest.raises(UserError, match="not found"):
        check_networks(network_specs(["networks.lora"], [str(tmp_path / "a.safetensors")], None, None))


def test_a_network_of_another_family_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)}, file)
    with pytest.raises(UserError, match="other"):
        load_networks(network_specs(["networks.lora"], [str(file)], None, None), model)


def test_a_foreign_network_of_other_sizes_is_a_sentence(
    model: LoadedModel, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*arguments: object, **options: object) -> None:
        raise RuntimeError("The size of tensor a (64) must match the size of tensor b (32)\nmore")

    foreign = types.ModuleType("foreign_network")
    foreign.create_network_from_weights = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_network", foreign)
    with pytest.raises(UserError, match=r"does not fit this model \(The size of tensor a"):
        load_networks(network_specs(["foreign_network"], [lora], None, None), model)


def test_applied_merged_and_pre_calculated_are_equal(tiny_sd15: Path, lora: str) -> None:
    def drawn(**options: object) -> torch.Tensor:
        model = family("sd").load(tiny_sd15)
        specs = network_specs(["networks.lora"], [lora], [0.8], None)
        return picture(model, load_networks(specs, model, dtype=torch.float32, **options))

    applied = drawn()
    limit = 1e-3 * applied.abs().max().item()
    torch.testing.assert_close(drawn(merge_first=1), applied, rtol=0, atol=limit)
    torch.testing.assert_close(drawn(pre_calculate=True), applied, rtol=0, atol=limit)


@pytest.mark.parametrize("pre_calculate", [False, True])
def test_multipliers_per_batch(model: LoadedModel, lora: str, pre_calculate: bool) -> None:
    plain = picture(model, Networks())
    specs = network_specs(["networks.lora"], [lora], [0.8], None)
    networks = load_networks(specs, model, pre_calculate=pre_calculate)
    limit = 1e-3 * plain.abs().max().item()
    default = picture(model, networks)
    assert (default - plain).abs().max() > 10 * limit
    torch.testing.assert_close(picture(model, networks, (0.0,)), plain, rtol=0, atol=limit)
    torch.testing.assert_close(picture(model, networks), default, rtol=0, atol=limit)


def test_a_short_multiplier_list_goes_on_with_its_last_value() -> None:
    networks = Networks([AppliedNetwork(None, 1.0, name) for name in "abc"])
    assert networks.multipliers((0.5, 0.7)) == [0.5, 0.7, 0.7]
    assert networks.multipliers((0.1, 0.2, 0.3, 0.4)) == [0.1, 0.2, 0.3]
    assert networks.multipliers(None) == [1.0, 1.0, 1.0]
    assert networks.description((0.5,)) == "a:0.5, b:0.5, c:0.5"


def test_networks_that_lack_pre_calculation_are_named(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(torch.nn.Module):
        def apply_to(self, *_: object) -> None:
            pass

    module = types.ModuleType("plain_network")
    module.create_network_from_weights = lambda *_, **__: (Plain(), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plain_network", module)
    with pytest.raises(UserError, match="cannot be pre-calculated"):
        load_networks(network_specs(["plain_network"], ["style.pt"], None, None), model, pre_calculate=True)


def test_metadata_are_shown(lora: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.messages import log

    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO", "toolkit"):
        show_metadata(network_specs(["networks.lora"], [lora], None, None))
    assert "ss_network_dim: 2" in caplog.text


METHODS = {
    "networks.lora": {},
    "networks.lora_fa": {},
    "networks.dylora": {},
    "networks.oft": {"enable_all_linear": "true"},
}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_draws(method: str, name: str, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """A file of each method changes the picture, alike when applied, merged and pre-calculated."""
    source = tiny_sdxl if name == "sdxl" else tiny_sd15
    module, file = importlib.import_module(method), tmp_path / "network.safetensors"

    def model() -> LoadedModel:
        return family(name).load(source)

    def drawn(**options: object) -> torch.Tensor:
        fresh = model()
        specs = network_specs([method], [str(file)], [0.7], None) if options.pop("with_network", True) else []
        networks = load_networks(specs, fresh, dtype=torch.float32, **options) if specs else Networks()
        request = ImageRequest(prompt="a red circle", width=64, height=64, steps=2, seed=7)
        return Engine(family(name), fresh, sampler="euler", networks=networks).latents([request])

    made = model()
    encoders = made.text_encoders if name == "sdxl" else made.text_encoders[0]
    network = module.create_network(1.0, 4, 4.0, None, encoders, made.unet, **METHODS[method])
    network.apply_to(encoders, made.unet, True, True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(file), None, {})

    plain, applied = drawn(with_network=False), drawn()
    limit = 1e-3 * applied.abs().max().item()
    assert (applied - plain).abs().max() > 10 * limit
    torch.testing.assert_close(drawn(merge_first=1), applied, rtol=0, atol=limit)
    torch.testing.assert_close(drawn(pre_calculate=True), applied, rtol=0, atol=limit)
