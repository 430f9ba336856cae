"""What LoRA-FA, DyLoRA and OFT networks do for their callers, and LoRA on SDXL."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import library.messages
from library.messages import UserError
from library.models.family import family
from networks import dylora, lora, lora_fa, oft
from networks.blocks import SD, SDXL, get_block_index
from tests.networks.network_models import predict, randomize, small_text_encoder, small_unet

METHODS = (lora, lora_fa, dylora, oft)
CONV = {
    lora: {"conv_dim": "4", "conv_alpha": "2"},
    lora_fa: {"conv_dim": "4", "conv_alpha": "2"},
    dylora: {"conv_dim": "4", "unit": "2"},
    oft: {"enable_all_linear": "1", "enable_conv": "true"},
}


class Model:
    """A small frozen model of a family, with one call of its U-Net."""

    def __init__(self, name: str, tiny_sdxl: Path) -> None:
        if name == "sdxl":
            model = family("sdxl").load(tiny_sdxl)
            self.text_encoder: Any = model.text_encoders
            self.unet = model.unet
            for module in (*model.text_encoders, model.unet):
                module.requires_grad_(False)
        else:
            self.text_encoder, self.unet = small_text_encoder(), small_unet()
        self.is_sdxl = name == "sdxl"

    def __call__(self) -> torch.Tensor:
        if not self.is_sdxl:
            return predict(self.unet)
        generator = torch.Generator().manual_seed(2)
        config = self.unet.config
        text = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
        vector = torch.randn(2, config.projection_class_embeddings_input_dim, generator=generator)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        return self.unet(latents, torch.tensor([1, 301]), text, vector)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("module", METHODS, ids=lambda m: m.__name__)
def test_train_save_load_merge(tmp_path: Path, tiny_sdxl: Path, module: Any, name: str) -> None:
    """The calls of a training script and of a picture script in their order."""
    model = Model(name, tiny_sdxl)
    with torch.no_grad():
        before = model()
    network = module.create_network(1.0, 4, 2.0, None, model.text_encoder, model.unet, **CONV[module])
    network.apply_to(model.text_encoder, model.unet, True, True)
    with torch.no_grad():
        torch.testing.assert_close(model(), before)
    network.enable_gradient_checkpointing()
    groups, names = network.prepare_optimizer_params(1e-3, 1e-2, 1e-3)
    assert names == (["unet"] if module is oft else ["textencoder", "unet"])
    network.prepare_grad_etc(model.text_encoder, model.unet)
    network.on_epoch_start(model.text_encoder, model.unet)
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        if hasattr(network, "on_step_start"):
            network.on_step_start(model.text_encoder, model.unet)
        model().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        trained = model()
    assert (trained - before).abs().max() > 1e-3
    if module is lora_fa:
        state = network.state_dict()
        assert all(torch.equal(state[key], start[key]) for key in start if "lora_down" in key)

    file = tmp_path / "network.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": module.__name__})
    for way in ("apply", "merge", "pre-calculate"):
        fresh = Model(name, tiny_sdxl)
        again, weights = module.create_network_from_weights(
            1.0, str(file), None, fresh.text_encoder, fresh.unet, for_inference=True
        )
        assert again.is_mergeable()
        if way == "merge":
            again.merge_to(fresh.text_encoder, fresh.unet, weights, torch.float32, "cpu")
        else:
            again.apply_to(fresh.text_encoder, fresh.unet)
            assert not again.load_state_dict(weights, False).unexpected_keys
            again.eval()
        if way == "pre-calculate":
            again.backup_weights()
            again.pre_calculation()
        with torch.no_grad():
            torch.testing.assert_close(fresh(), trained, atol=1e-4, rtol=1e-4, msg=way)
        if way == "pre-calculate":
            again.restore_weights()
            with torch.no_grad():
                torch.testing.assert_close(fresh(), before)
        if way == "apply":
            again.set_multiplier(0.0)
            with torch.no_grad():
                torch.testing.assert_close(fresh(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", METHODS, ids=lambda m: m.__name__)
def test_strength_is_the_same_applied_and_merged(tmp_path: Path, tiny_sdxl: Path, module: Any) -> None:
    model = Model("sd", tiny_sdxl)
    network = module.create_network(1.0, 4, 2.0, None, model.text_encoder, model.unet, **CONV[module])
    network.apply_to(model.text_encoder, model.unet, True, True)
    randomize(network)
    file = tmp_path / "network.safetensors"
    network.save_weights(str(file), None, {})
    found = []
    for way in ("apply", "merge"):
        fresh = Model("sd", tiny_sdxl)
        again, weights = module.create_network_from_weights(
            0.6, str(file), None, fresh.text_encoder, fresh.unet, for_inference=True
        )
        if way == "merge":
            again.merge_to(fresh.text_encoder, fresh.unet, weights, None, None)
        else:
            again.apply_to(fresh.text_encoder, fresh.unet, True, True)
            again.load_state_dict(weights, False)
        with torch.no_grad():
            found.append(fresh())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


# LoRA-FA


def test_lora_fa_files_are_lora_files(tmp_path: Path) -> None:
    text_encoder, unet = small_text_encoder(), small_unet()
    network = lora_fa.create_network(1.0, 4, 2.0, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    randomize(network)
    file = tmp_path / "fa.safetensors"
    network.save_weights(str(file), None, {})
    expected = predict(unet).detach()
    text_encoder, unet = small_text_encoder(), small_unet()
    plain, weights = lora.create_network_from_weights(1.0, str(file), None, text_encoder, unet)
    plain.apply_to(text_encoder, unet, True, True)
    plain.load_state_dict(weights)
    torch.testing.assert_close(predict(unet).detach(), expected)


# DyLoRA


def dylora_module(rank: int = 4, unit: int = 2) -> dylora.DyLoRAModule:
    module = dylora.DyLoRAModule("lora_unet_x", nn.Linear(6, 5).requires_grad_(False), 1.0, rank, 4.0, unit)
    module.apply_to()
    return randomize(module).train()


def test_dylora_trains_one_unit_a_step() -> None:
    module = dylora_module()
    module.draw = lambda: 2
    module(torch.randn(3, 6)).sum().backward()
    for pieces in (module.lora_A, module.lora_B):
        assert [piece.grad is not None for piece in pieces] == [False, False, True, True]
    assert all(piece.requires_grad for piece in module.parameters())


def test_dylora_draws_once_a_step() -> None:
    """So that what checkpointing computes again is what was computed; without steps every forward draws."""
    module = dylora_module(16, 1)
    free = {module.draw() for _ in range(100)}
    assert len(free) > 8
    held = set()
    for _ in range(50):
        module.start_step()
        ranks = {module.draw() for _ in range(3)}
        assert len(ranks) == 1
        held |= ranks
    assert len(held) > 8


def test_dylora_under_checkpointing() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        text_encoder, unet = small_text_encoder(), small_unet()
        torch.manual_seed(4)
        network = dylora.create_network(1.0, 4, 2.0, None, text_encoder, unet, unit="1")
        network.apply_to(text_encoder, unet, True, True)
        randomize(network).train()
        unet.train()
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        random.seed(7)
        network.on_step_start(text_encoder, unet)
        predict(unet).square().mean().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in network.unet_loras[0].parameters()])
        gradients[-1] += [None if p.grad is None else p.grad.clone() for p in network.unet_loras[-1].parameters()]
    assert any(gradient is not None for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


def test_dylora_files(tmp_path: Path) -> None:
    """Two text encoders are numbered; a file without alphas and a unit for a file are taken."""
    encoders, unet = [small_text_encoder(1), small_text_encoder(1)], small_unet()
    network = dylora.create_network(1.0, 4, 2.0, None, encoders, unet)
    network.apply_to(encoders, unet, True, True)
    assert {adapter.lora_name[:8] for adapter in network.text_encoder_loras} == {"lora_te1", "lora_te2"}
    file = tmp_path / "dylora.safetensors"
    network.save_weights(str(file), torch.float16, {})
    weights = {key: value for key, value in load_file(file).items() if not key.endswith("alpha")}
    save_file(weights, file)
    again, _ = dylora.create_network_from_weights(1.0, str(file), None, encoders, small_unet(), unit="2")
    assert {(a.unit, a.lora_dim, a.scale) for a in again.unet_loras} == {(2, 4, 1.0)}
    assert not hasattr(again, "apply_max_norm_regularization")


@pytest.mark.parametrize(
    ("dim", "arguments", "words"),
    [(4, {"unit": "3"}, "no multiple"), (4, {"conv_dim": "8"}, "one rank"), (4, {"unit": "0"}, "not positive")],
)
def test_dylora_refuses(dim: int, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dylora.create_network(1.0, dim, 1.0, None, None, small_unet(), **arguments)


# OFT


def test_oft_refuses() -> None:
    unet = small_unet()
    with pytest.raises(UserError, match=r"oft_unet_.*do not fall into 5"):
        oft.create_network(1.0, 5, 1e-3, None, None, unet)
    network = oft.create_network(1.0, 4, 1e-3, None, None, unet)
    with pytest.raises(UserError, match="text encoders"):
        network.apply_to(None, unet, True, False)
    weights = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 64, 1, 1)}
    with pytest.raises(UserError, match="a network for SD"):
        oft.create_network_from_weights(1.0, None, None, None, unet, weights)


@pytest.mark.parametrize(
    ("word", "is_on", "warns"), [("True", True, 0), ("0", False, 0), ("False", False, 0), ("maybe", True, 1)]
)
def test_oft_switches_are_words(
    word: str, is_on: bool, warns: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.messages, "_said", set())
    monkeypatch.setattr(library.messages.log, "propagate", True)
    with caplog.at_level("WARNING", "toolkit"):
        network = oft.create_network(1.0, 4, 1e-3, None, None, small_unet(), enable_all_linear=word)
    assert any("_ff_net_" in adapter.lora_name for adapter in network.unet_loras) == is_on
    assert len(caplog.records) == warns


def test_oft_over_another_network() -> None:
    """Applied over a LoRA it turns the sum, as merging both in this order does."""
    text_encoder, unet = small_text_encoder(), small_unet()
    plain = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet)
    plain.apply_to(text_encoder, unet, True, True)
    turned = oft.create_network(1.0, 4, 10.0, None, text_encoder, unet)
    turned.apply_to(text_encoder, unet, True, True)
    for network in (plain, turned):
        randomize(network)
    with torch.no_grad():
        applied = predict(unet)
        for network in (plain, turned):
            network.backup_weights()
        for network in (plain, turned):
            network.pre_calculation()
        torch.testing.assert_close(predict(unet), applied, atol=1e-4, rtol=1e-4)


# Blocks of SDXL


def test_sdxl_blocks(tiny_sdxl: Path) -> None:
    model = Model("sdxl", tiny_sdxl)
    dims = [0] + [2] * 9 + [3] * 3 + [4] * 9 + [0]
    network = lora.create_network(
        1.0, 8, 1.0, None, model.text_encoder, model.unet, block_dims=",".join(map(str, dims)), conv_dim="1"
    )
    assert network.layout is SDXL
    found = {(a.lora_name.split("_")[2], a.lora_dim) for a in network.unet_loras if "attn1_to_q" in a.lora_name}
    assert found == {("input", 2), ("middle", 3), ("output", 4)}
    assert {a.lora_dim for a in network.text_encoder_loras} == {8}


def test_sdxl_block_rates(tiny_sdxl: Path) -> None:
    model = Model("sdxl", tiny_sdxl)
    network = lora.create_network(
        1.0,
        2,
        1.0,
        None,
        None,
        model.unet,
        down_lr_weight="0,0,0,0,0.5,0.5,1,1,1",
        mid_lr_weight="0.1,2",
        up_lr_weight="linear+1",
    )
    assert network.block_lr_weight == [
        1.0,
        *[0, 0, 0, 0, 0.5, 0.5, 1, 1, 1],
        *[0.1, 2, 1],
        *[1 + i / 8 for i in range(9)],
        1.0,
    ]
    network.apply_to(None, model.unet, False, True)
    groups, names = network.prepare_optimizer_params(None, 1e-3, None)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates["unet_block5"] == pytest.approx(5e-4)
    assert rates["unet_block11"] == pytest.approx(2e-3)
    assert not [a for a in network.unet_loras if "input_blocks_1_" in a.lora_name or "input_blocks_3_" in a.lora_name]


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_dims": ",".join(["4"] * 25)},
        {"down_lr_weight": ",".join(["1"] * 12)},
        {"conv_block_dims": ",".join(["4"] * 25), "block_dims": ",".join(["4"] * 23)},
    ],
)
def test_lists_of_the_other_family_are_refused(tiny_sdxl: Path, arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"as for SD 1.x/2.x.*give (23|9)"):
        lora.create_network(1.0, 4, 1.0, None, None, Model("sdxl", tiny_sdxl).unet, **arguments)


def test_later_call_forms() -> None:
    """With `is_sdxl` first, as sd-scripts since v0.9.0 calls these functions."""
    names = {"label_emb_0_0": 0, "input_blocks_8_1_proj_in": 9, "middle_block_2_in_layers_2": 12}
    names |= {"output_blocks_8_0_skip_connection": 21, "out_2": 22, "time_embed_0": 0, "norm": -1}
    for name, index in names.items():
        assert get_block_index(f"lora_unet_{name}", True) == index
        assert lora.get_block_index(f"lora_unet_{name}") == -1
    assert lora.parse_block_lr_kwargs(True, {}) is None
    assert lora.parse_block_lr_kwargs(True, {"mid_lr_weight": "0.5"}) == [1.0] * 10 + [0.5, 1.0, 1.0] + [1.0] * 10
    assert lora.parse_block_lr_kwargs(False, {"mid_lr_weight": "0.5"}) == [1.0] * 12 + [0.5] + [1.0] * 12
    weights = lora.get_block_lr_weight(True, [0.0] * 9, None, None, 0.0)
    assert weights == [1.0] + [0] * 9 + [1.0] * 13
    ranks = lora.get_block_dims_and_alphas(True, None, None, 4, 1.0, None, None, 2, None)
    assert [len(values) for values in ranks] == [SDXL.total] * 4
    removed = lora.remove_block_dims_and_alphas(True, *ranks, weights)
    assert removed[0] == removed[2][:0] + [4] + [0] * 9 + [4] * 13
    assert removed[2] == [2] + [0] * 9 + [2] * 13
    assert len(lora.get_block_dims_and_alphas(False, None, None, 4, 1.0, None, None, None, None)[0]) == SD.total
