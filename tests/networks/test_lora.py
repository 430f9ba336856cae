"""What a LoRA network does for its callers: creation, training, files, merging, refusals."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import library.messages
from library.messages import UserError
from library.models.key_maps import sd_unet_map
from networks import lora
from tests.networks.network_models import predict, randomize, small_text_encoder, small_unet


def applied(text: bool = True, alpha: float = 2.0, **arguments: str) -> tuple[lora.LoRANetwork, Any, nn.Module]:
    """A network with random values on a small model."""
    text_encoder, unet = small_text_encoder() if text else None, small_unet()
    network = lora.create_network(1.0, 4, alpha, None, text_encoder, unet, **arguments)
    network.apply_to(text_encoder, unet, True, True)
    return randomize(network), text_encoder, unet


class HostReads(TorchDispatchMode):
    """Counts values read from tensors by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.startswith("_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def encode(text_encoder: nn.Module) -> torch.Tensor:
    return text_encoder(torch.arange(77)[None] % 100)[0]


def test_first_values_follow_the_recorded_order_of_draws() -> None:
    """Constructors' draws of down and up, then down again (uniform within 1/sqrt(inputs)), up zero."""
    torch.manual_seed(5)
    module = lora.LoRAModule("x", nn.Linear(6, 5), lora_dim=3)
    torch.manual_seed(5)
    nn.Linear(6, 5)
    nn.Linear(6, 3, bias=False)
    nn.Linear(3, 5, bias=False)
    expected = torch.empty(3, 6)
    nn.init.kaiming_uniform_(expected, a=5**0.5)
    assert torch.equal(module.lora_down.weight, expected)
    assert module.lora_down.weight.abs().max() <= 6**-0.5
    assert not module.lora_up.weight.any()


@pytest.mark.parametrize(
    ("alpha", "scale", "dtype"),
    [(None, 1.0, torch.int64), (0, 1.0, torch.int64), (2, 0.5, torch.int64), (2.0, 0.5, torch.float32)],
)
def test_alpha(alpha: float | None, scale: float, dtype: torch.dtype) -> None:
    module = lora.LoRAModule("x", nn.Linear(3, 3), lora_dim=4, alpha=alpha)
    assert module.scale == scale
    assert module.alpha.dtype == dtype


def test_a_new_network_changes_nothing_and_trains() -> None:
    text_encoder, unet = small_text_encoder(), small_unet()
    with torch.no_grad():
        before, text = predict(unet), encode(text_encoder)
    network = lora.create_network(1.0, None, None, None, text_encoder, unet)
    assert (network.lora_dim, network.alpha) == (4, 1.0)
    network.apply_to(text_encoder, unet, True, True)
    network.enable_gradient_checkpointing()
    groups, names = network.prepare_optimizer_params(1e-3, 1e-2, 1e-3)
    assert names == ["textencoder", "unet"]
    network.prepare_grad_etc(text_encoder, unet)
    network.on_epoch_start(text_encoder, unet)
    with torch.no_grad():
        assert torch.equal(encode(text_encoder), text)
        torch.testing.assert_close(predict(unet), before)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        (predict(unet).square().mean() + encode(text_encoder).square().mean()).backward()
        assert all(parameter.grad is not None for parameter in network.get_trainable_params())
        optimizer.step()
        optimizer.zero_grad()
    assert (predict(unet) - before).abs().max() > 1e-3
    assert (encode(text_encoder) - text).abs().max() > 1e-4
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize(("flags", "parts"), [((True, False), (1, 0)), ((False, True), (0, 1)), ((), (1, 1))])
def test_parts_that_are_not_applied_are_left_alone(flags: tuple[bool, ...], parts: tuple[int, int]) -> None:
    text_encoder, unet = small_text_encoder(), small_unet()
    network = lora.create_network(1.0, 4, 1, None, [text_encoder], unet)
    network.apply_to(text_encoder, unet, *flags)
    assert (bool(network.text_encoder_loras), bool(network.unet_loras)) == (bool(parts[0]), bool(parts[1]))
    assert any(key.startswith("lora_te_") for key in network.state_dict()) == bool(parts[0])
    assert any(key.startswith("lora_unet_") for key in network.state_dict()) == bool(parts[1])


def test_two_text_encoders_are_numbered() -> None:
    network = lora.create_network(1.0, 4, 1, None, [small_text_encoder(1), small_text_encoder(1)], small_unet())
    starts = {module.lora_name[:8] for module in network.text_encoder_loras}
    assert starts == {"lora_te1", "lora_te2"}


def test_a_foreign_text_encoder_gets_the_names_of_files() -> None:
    """transformers 5 has no level `text_model`; SDPA attention of some versions has a class of its own."""

    class CLIPSdpaAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(CLIPSdpaAttention())

    network = lora.LoRANetwork(Encoder(), nn.Identity())
    assert [module.lora_name for module in network.text_encoder_loras] == ["lora_te_text_model_encoder_0_q_proj"]


# Learning rates


def test_a_rate_of_zero_freezes_the_part() -> None:
    network, text_encoder, unet = applied()
    groups, names = network.prepare_optimizer_params(0.0, 1e-3, 1e-4)
    network.prepare_grad_etc(text_encoder, unet)
    assert names == ["unet"]
    assert len(groups) == 1
    assert len(list(network.get_trainable_params())) == 2 * len(network.unet_loras)
    with pytest.raises(UserError, match="learning rate"):
        network.prepare_optimizer_params(0.0, 0.0, 1e-4)


def test_loraplus_groups() -> None:
    network, _, _ = applied(loraplus_lr_ratio="4", loraplus_text_encoder_lr_ratio="8")
    groups, names = network.prepare_optimizer_params(None, 1e-3, 1e-4)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group.get("lr") for group in groups] == [None, pytest.approx(8e-4), 1e-3, pytest.approx(4e-3)]
    ups = {id(module.lora_up.weight) for module in network.adapters}
    for name, group in zip(names, groups, strict=True):
        assert all((id(parameter) in ups) == ("plus" in name) for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_block_rates_use_the_default_rate_and_name_their_blocks() -> None:
    network, _, _ = applied(text=False, down_lr_weight="sine", up_lr_weight="0.5,0,1")
    groups, names = network.prepare_optimizer_params(None, None, 1e-3)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert rates["unet_block12"] == pytest.approx(1e-3)
    assert "unet_block14" not in rates
    with pytest.raises(UserError, match="rate"):
        network.prepare_optimizer_params(None, None, None)


def test_bad_arguments_are_one_line() -> None:
    unet = small_unet()
    for arguments, words in (
        ({"conv_dim": "four"}, "conv_dim=four"),
        ({"block_dims": "1,2"}, "block_dims has 2"),
        ({"down_lr_weight": "sinus"}, "sinus"),
        ({"mid_lr_weight": "x"}, "mid_lr_weight"),
    ):
        with pytest.raises(UserError, match=words):
            lora.create_network(1.0, 4, 1, None, [], unet, **arguments)


def test_unknown_arguments_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    library.messages._said.clear()
    with caplog.at_level(logging.WARNING):
        lora.create_network(1.0, 4, 1, None, [], small_unet(), conv_dims="4", dropout=None)
    assert "conv_dims has no effect" in caplog.text
    assert "did you mean conv_dim?" in caplog.text
    assert "dropout" not in caplog.text.replace("conv_dims", "")


def test_arguments_beside_the_ranks_of_a_file(caplog: pytest.LogCaptureFixture) -> None:
    """LoRA+ counts; ranks and dropouts, which the file or nobody decides, are named."""
    library.messages._said.clear()
    network, _, _ = applied(text=False)
    with caplog.at_level(logging.WARNING):
        other, _ = lora.create_network_from_weights(
            1, None, None, [], small_unet(), network.state_dict(), loraplus_lr_ratio="2", rank_dropout="0.1"
        )
    other.apply_to([], None)
    assert other.prepare_optimizer_params(None, 1e-3, None)[1] == ["unet", "unet plus"]
    assert "rank_dropout has no effect with the ranks of a file" in caplog.text


def test_the_weight_norm_cap_reads_nothing_on_the_host() -> None:
    """Norms against the products themselves, with convolutions and several shapes."""
    network, _, _ = applied(alpha=3.0, conv_dim="2", conv_alpha="1")
    deltas = {module.lora_name: module.get_weight() for module in network.adapters}
    limit = sorted(float(delta.norm()) for delta in deltas.values())[len(deltas) // 2] * 1.001
    with HostReads() as mode:
        scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert mode.count == 0
    norms = [float(module.get_weight().norm()) for module in network.adapters]
    assert int(scaled) == sum(float(delta.norm()) > limit for delta in deltas.values())
    assert float(mean) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert float(largest) == pytest.approx(max(norms), rel=1e-5)
    assert max(norms) <= limit * (1 + 1e-5)
    for module in network.adapters:
        delta = deltas[module.lora_name]
        torch.testing.assert_close(
            module.get_weight(), delta * min(1, limit / float(delta.norm())), atol=1e-6, rtol=1e-4
        )


def test_block_ranks_on_another_family_are_refused() -> None:
    """A U-Net in Stability names has no such blocks; the original silently used the 25th value."""
    stability = nn.Module()
    stability.add_module("input_blocks", nn.ModuleList([type("Transformer2DModel", (nn.Module,), {})()]))
    stability.input_blocks[0].proj_in = nn.Linear(4, 4)
    with pytest.raises(UserError, match="block"):
        lora.create_network(1.0, 4, 1, None, [], stability, block_dims=",".join(["4"] * 25))


# Files


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_saved_file(tmp_path: Path, dtype: torch.dtype | None) -> None:
    network, _, _ = applied()
    file = tmp_path / "net.safetensors"
    network.save_weights(str(file), dtype, {"ss_network_dim": "4", "modelspec.title": "net"})
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.title"] == "net"
    raw = file.read_bytes()
    tensors = load_file(file)
    assert tensors.keys() == network.state_dict().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    # The hash is over the stored data, made with the ss_ keys alone.
    save_file(tensors, tmp_path / "again.safetensors", {"ss_network_dim": "4"})
    again = (tmp_path / "again.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", again[:8])[0]
    assert metadata["sshs_model_hash"] == hashlib.sha256(again[start:]).hexdigest()
    assert raw[8 + struct.unpack("<Q", raw[:8])[0] :] == again[start:]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8]
    assert [path.name for path in tmp_path.iterdir() if "again" not in path.name] == ["net.safetensors"]


def test_pickled_file_and_no_metadata(tmp_path: Path) -> None:
    network, _, _ = applied(text=False)
    network.save_weights(str(tmp_path / "net.pt"), torch.float16, None)
    tensors = torch.load(tmp_path / "net.pt", weights_only=True)
    assert tensors.keys() == network.state_dict().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    network.save_weights(str(tmp_path / "net.safetensors"), None, None)
    with safe_open(tmp_path / "net.safetensors", "pt") as opened:
        assert opened.metadata().keys() == {"sshs_model_hash", "sshs_legacy_hash"}


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "conv_alpha": "1"}])
def test_file_round_trip(tmp_path: Path, arguments: dict[str, str]) -> None:
    """A file gives the same outputs applied again, with ranks from the file, merged and pre-calculated."""
    network, text_encoder, unet = applied(**arguments)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, {})
    with torch.no_grad():
        expected, text = predict(unet), encode(text_encoder)

    def check(unet: nn.Module, text_encoder: nn.Module) -> None:
        with torch.no_grad():
            torch.testing.assert_close(predict(unet), expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(encode(text_encoder), text, atol=2e-5, rtol=1e-4)

    text_encoder, unet = small_text_encoder(), small_unet()
    again = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **arguments)
    again.apply_to(text_encoder, unet, True, True)
    report = again.load_weights(file)
    assert not report.missing_keys and not report.unexpected_keys
    check(unet, text_encoder)

    text_encoder, unet = small_text_encoder(), small_unet()
    again, weights = lora.create_network_from_weights(1.0, file, None, text_encoder, unet, for_inference=True)
    assert again.is_mergeable()
    again.merge_to(text_encoder, unet, weights, torch.float32, "cpu")
    check(unet, text_encoder)

    text_encoder, unet = small_text_encoder(), small_unet()
    with torch.no_grad():
        untouched = predict(unet)
    again, weights = lora.create_network_from_weights(1.0, file, None, [text_encoder], unet, for_inference=True)
    again.apply_to(text_encoder, unet)
    again.load_state_dict(weights, False)
    again.backup_weights()
    for _ in range(2):
        again.restore_weights()
        again.pre_calculation()
        check(unet, text_encoder)
    again.restore_weights()
    with torch.no_grad():
        torch.testing.assert_close(predict(unet), untouched)


def test_pre_calculated_networks_accumulate_and_follow_their_multipliers(tmp_path: Path) -> None:
    network, _, unet = applied(text=False)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, {})
    unet = small_unet()
    networks = []
    for _ in range(2):
        other, weights = lora.create_network_from_weights(1.0, file, None, [], unet, for_inference=True)
        other.apply_to([], unet)
        other.load_state_dict(weights, False)
        other.backup_weights()
        networks.append(other)
    outputs = []
    for multipliers in ((0.3, 0.5), (0.8, 0.0), (0.0, 0.8)):
        for other, multiplier in zip(networks, multipliers, strict=True):
            other.set_multiplier(multiplier)
        with torch.no_grad():
            outputs.append(predict(unet))
            for other in networks:
                other.restore_weights()
            for other in networks:
                other.pre_calculation()
            outputs.append(predict(unet))
        for other in networks:
            other.restore_weights()
            other.set_enabled(True)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=2e-5, rtol=1e-4)


def test_a_disabled_network_is_transparent() -> None:
    network, _, unet = applied(text=False)
    with torch.no_grad():
        network.set_enabled(False)
        torch.testing.assert_close(predict(unet), predict(small_unet()))


def test_merging_into_half_precision_layers() -> None:
    network, _, _ = applied(text=False)
    state = network.state_dict()
    target = small_unet().to(torch.bfloat16)
    other, weights = lora.create_network_from_weights(1.0, None, None, [], target, weights_sd=state, for_inference=True)
    other.merge_to([], target, weights, torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in target.parameters()} == {torch.bfloat16}
    module = other.unet_loras[0]
    exact = small_unet().get_parameter(_path_of(target, module.org_module_ref[0]) + ".weight") + module.get_weight()
    torch.testing.assert_close(module.org_module_ref[0].weight.float(), exact, atol=0.02, rtol=0.02)


def _path_of(root: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in root.named_modules() if module is wanted)


def test_merging_matches_whole_names() -> None:
    """`..._net_2` must not take the tensors of `..._net_20`, whatever the order of the keys."""
    root = nn.Module()
    root.block = type("Transformer2DModel", (nn.Module,), {})()
    root.block.net_2, root.block.net_20 = nn.Linear(4, 4), nn.Linear(4, 4)
    network = lora.create_network(1.0, 2, 2, None, [], root)
    network.apply_to([], root)
    randomize(network)
    state = dict(sorted(network.state_dict().items()))
    before = {name: module.weight.clone() for name, module in (("2", root.block.net_2), ("20", root.block.net_20))}
    expected = {name: network.get_submodule(f"lora_unet_block_net_{name}").get_weight() for name in before}
    fresh, weights = lora.create_network_from_weights(1.0, None, None, [], root, weights_sd=state, for_inference=True)
    fresh.merge_to([], root, weights, None, None)
    torch.testing.assert_close(root.block.net_2.weight, before["2"] + expected["2"])
    torch.testing.assert_close(root.block.net_20.weight, before["20"] + expected["20"])


def test_a_loaded_alpha_sets_the_strength(tmp_path: Path) -> None:
    """Training goes on from a file with the strength that every reader of the file gives it."""
    network, _, unet = applied(text=False, alpha=3.0)
    network.save_weights(str(tmp_path / "net.safetensors"), None, {})
    other_unet = small_unet()
    other = lora.create_network(1.0, 4, 1.0, None, [], other_unet)
    other.apply_to([], other_unet)
    other.load_weights(str(tmp_path / "net.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(predict(other_unet), predict(unet))


def test_missing_alphas_mean_the_rank() -> None:
    network, _, _ = applied(text=False, alpha=4.0)
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("alpha")}
    other, _ = lora.create_network_from_weights(1.0, None, None, [], small_unet(), weights_sd=state)
    assert {module.scale for module in other.unet_loras} == {1.0}


def to_stability_names(state: dict[str, torch.Tensor], unet: nn.Module) -> dict[str, torch.Tensor]:
    """The same network as a program with Stability's layer names would write it."""
    table = sd_unet_map()
    names = {}
    for path, _ in unet.named_modules():
        theirs = table.to_stability(path) if path else None
        if theirs:
            names["lora_unet_" + path.replace(".", "_")] = "lora_unet_" + theirs.replace(".", "_")
    renamed = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        renamed[f"{names.get(name, name)}.{rest}"] = value
    return renamed


def test_both_naming_styles_load(tmp_path: Path) -> None:
    network, _, unet = applied(conv_dim="2")
    state = to_stability_names(network.state_dict(), unet)
    assert not any("down_blocks" in key or "up_blocks" in key for key in state)
    file = tmp_path / "stability.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    with torch.no_grad():
        expected = predict(unet)

    fresh = small_unet()
    other, weights = lora.create_network_from_weights(1.0, str(file), None, small_text_encoder(), fresh)
    assert len(other.unet_loras) == len(network.unet_loras)
    other.apply_to(None, fresh)
    assert not other.load_state_dict(weights, False).missing_keys
    with torch.no_grad():
        torch.testing.assert_close(predict(fresh), expected)

    fresh, fresh_text = small_unet(), small_text_encoder()
    third = lora.create_network(1.0, 4, 2.0, None, fresh_text, fresh, conv_dim="2")
    third.apply_to(fresh_text, fresh)
    assert not third.load_weights(str(file)).missing_keys
    with torch.no_grad():
        torch.testing.assert_close(predict(fresh), expected)


# Refusals


def foreign(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(4, 4) for key in keys}


SDXL_NAME = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight"
REFUSED = {
    "SDXL": foreign(SDXL_NAME, SDXL_NAME.replace("down", "up")),
    "SDXL ": foreign("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    "Flux or SD3": foreign("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
    "OFT": foreign("oft_unet_down_blocks_0_attentions_0_proj_in.oft_blocks"),
    "LLLite": foreign("lllite_unet_input_blocks_4_1.down.0.weight"),
    "embedding": foreign("emb_params"),
    "whole model": foreign("model.diffusion_model.out.0.weight"),
    "no network": foreign("something"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_files_of_another_kind_are_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "other.safetensors"
    save_file(REFUSED[kind], file)
    with pytest.raises(UserError, match=kind.strip()) as error:
        lora.create_network_from_weights(1.0, str(file), None, small_text_encoder(), small_unet())
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    network, _, _ = applied()
    with pytest.raises(UserError, match=kind.strip()):
        network.load_weights(str(file))


@pytest.mark.parametrize(("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x")])
def test_a_network_for_another_context_width_is_named(tmp_path: Path, width: int, family: str) -> None:
    """SD 1.x and 2.x share their names; the width of the text tells them apart."""
    unet = small_unet(cross_attention_dim=width)
    network = lora.create_network(1.0, 4, 1, None, [], unet)
    network.apply_to([], unet)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, {})
    with pytest.raises(UserError, match=rf"{family}.*attn2_to_k"):
        lora.create_network_from_weights(1.0, file, None, [], small_unet())


def test_a_file_of_another_rank_is_told_with_the_remedy(tmp_path: Path) -> None:
    network, _, _ = applied(text=False)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, {})
    unet = small_unet()
    other = lora.create_network(1.0, 8, 1, None, [], unet)
    other.apply_to([], unet)
    with pytest.raises(UserError, match="--dim_from_weights"):
        other.load_weights(file)


@pytest.mark.parametrize("suffix", ["hada_w1_a", "lokr_w1", "lora_mid.weight", "dora_scale", "diff"])
def test_weights_of_other_methods_are_refused(suffix: str) -> None:
    network, _, _ = applied(text=False)
    state = dict(network.state_dict())
    state[f"{network.unet_loras[0].lora_name}.{suffix}"] = torch.zeros(4, 4)
    with pytest.raises(UserError, match=r"lycoris\.kohya"):
        lora.create_network_from_weights(1.0, "x.safetensors", None, [], small_unet(), weights_sd=state)


def test_modules_without_a_layer_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    network, _, _ = applied(text=False)
    state = dict(network.state_dict()) | foreign("lora_unet_conv_in.lora_down.weight")
    with caplog.at_level(logging.WARNING):
        lora.create_network_from_weights(1.0, "net", None, [], small_unet(), weights_sd=state)
    assert f"1 of {len(network.unet_loras) + 1} modules have no layer here" in caplog.text


def test_a_truncated_file(tmp_path: Path) -> None:
    network, _, _ = applied(text=False)
    file = tmp_path / "net.safetensors"
    network.save_weights(str(file), None, {})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        network.load_weights(str(file))


# Third parties


def test_subclasses_of_the_module_work() -> None:
    """Forks subclass LoRAModule and hand their class to the network."""

    class Doubled(lora.LoRAModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.org_forward(x) + 2 * self.lora_up(self.lora_down(x)) * self.multiplier * self.scale

    unet, plain_unet = small_unet(), small_unet()
    network = lora.LoRANetwork([], unet, module_class=Doubled)
    network.apply_to([], unet)
    randomize(network)
    plain = lora.LoRANetwork([], plain_unet, multiplier=2.0)
    plain.apply_to([], plain_unet)
    randomize(plain)
    torch.testing.assert_close(predict(unet), predict(plain_unet), atol=1e-5, rtol=1e-4)


def test_import_as_top_level_module() -> None:
    """Copies of the original's tools put the directory of the networks on the path and import `lora`."""
    root = Path(lora.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{json.dumps(str(root / 'networks'))}, {json.dumps(str(root))}]; import lora"
    subprocess.run([sys.executable, "-c", code + "; lora.LoRANetwork"], check=True)


def test_applying_leaves_the_models_own_state_alone() -> None:
    """The adapters hang on layers without becoming part of the model's state."""
    plain = small_unet().state_dict()
    _, _, unet = applied(text=False)
    assert unet.state_dict().keys() == plain.keys()
