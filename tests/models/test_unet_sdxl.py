"""The SDXL U-Net against recorded numbers, the recorded module list, and diffusers' U-Net."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.messages import UserError
from library.models import unet_sdxl
from library.models.unet_config import SdxlUNetConfig
from library.models.unet_sdxl import SdxlUNet2DConditionModel, size_embeddings

# An upscaling pass of the generation scripts ("deep shrink") resizes features between levels.
LATER = {f"a.out_deepshrink_{depth}_t{t}" for depth in ("d0", "d3", "d4_d7") for t in (400, 999)}
TOLERANCE = 2e-5
TINY = SdxlUNetConfig(
    block_out_channels=(64, 128, 256),
    attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 1, 2),
    cross_attention_dim=192,
    projection_class_embeddings_input_dim=1664,
)
SMALL = SdxlUNetConfig(
    block_out_channels=(32, 64, 64),
    attention_head_dim=(1, 2, 2),
    transformer_layers_per_block=(1, 1, 2),
    cross_attention_dim=48,
    projection_class_embeddings_input_dim=1600,
    norm_num_groups=16,
)


def load_gzip(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def tiny_unet(source: Path, freq_shift: float) -> SdxlUNet2DConditionModel:
    model = unet_sdxl.from_config(dataclasses.replace(TINY, freq_shift=freq_shift))
    prefix = "model.diffusion_model."
    tensors = load_file(source)
    model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    return model.eval()


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    # Inside the U-Net values reach tens, so the tolerance follows their size.
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        actual / scale, expected / scale, atol=TOLERANCE, rtol=0, msg=lambda text: f"{name}: {text}"
    )


def check_case_a(model: SdxlUNet2DConditionModel, data: dict[str, torch.Tensor], suffix: str) -> set[str]:
    inputs = {name: data[f"a.{name}"].clone().requires_grad_() for name in ("sample", "context", "y")}
    hidden = {name[len("a.hidden.") :] for name in data if name.startswith("a.hidden.")}
    seen: dict[str, torch.Tensor] = {}

    def remember(name: str):
        return lambda _m, _i, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    for name in hidden:
        module = model.get_submodule(name)
        last = module[-1] if isinstance(module, torch.nn.ModuleList) else module
        last.register_forward_hook(remember(name))
    out = model(inputs["sample"], data["a.timesteps"], inputs["context"], inputs["y"])
    close(out, data[f"a.out{suffix}"], f"a.out{suffix}")
    close(model._sinusoids(data["a.timesteps"]), data[f"a.time_proj{suffix}"], "a.time_proj")
    grads = dict(zip(inputs, torch.autograd.grad(out.square().mean(), list(inputs.values())), strict=True))
    names = {f"a.{name}" for name in (*inputs, "timesteps", f"out{suffix}", f"time_proj{suffix}")}
    for name, grad in grads.items():
        key = f"a.grad_{name}{suffix}"
        if key in data:
            close(grad, data[key], key)
            names.add(key)
    if suffix:
        return names
    for name in hidden:
        close(seen[name], data[f"a.hidden.{name}"], name)
    return names | {f"a.hidden.{name}" for name in hidden}


def check_cases_b_c(model: SdxlUNet2DConditionModel, data: dict[str, torch.Tensor], suffix: str) -> set[str]:
    sizes = size_embeddings(data["c.orig_size"], data["c.crop"], data["c.target"])
    torch.testing.assert_close(sizes, data["c.size_embeddings"], atol=1e-6, rtol=0)
    y = torch.cat([data["c.pooled"], sizes], dim=1)
    torch.testing.assert_close(y, data["c.y"], atol=1e-6, rtol=0)
    with torch.no_grad():
        out = model(data["b.sample"], data["b.timesteps"], data["b.context"], data["b.y"])
        close(out, data[f"b.out{suffix}"], f"b.out{suffix}")
        out = model(data["a.sample"], data["a.timesteps"], data["a.context"], y)
    close(out, data[f"c.out{suffix}"], f"c.out{suffix}")
    names = {f"b.{name}" for name in ("sample", "timesteps", "context", "y", f"out{suffix}")}
    return (
        names
        | {f"c.{name}" for name in ("orig_size", "crop", "target", "size_embeddings", "pooled", "y")}
        | {f"c.out{suffix}"}
    )


def test_recorded_outputs(ruled_model, golden: Path) -> None:
    """Shift 1 is what the recorded version computed, shift 0 (`_fixed`) what models in use were trained with."""
    data = load_file(golden / "models_tiny_unet_sdxl.safetensors")
    seen: set[str] = set()
    for shift, suffix in ((1.0, ""), (0.0, "_fixed")):
        model = tiny_unet(ruled_model("sdxl"), shift)
        seen |= check_case_a(model, data, suffix) | check_cases_b_c(model, data, suffix)
    assert set(data) == seen | LATER


def test_size_vector(golden: Path) -> None:
    data = load_file(golden / "models_time_embedding.safetensors")
    sizes = data["sizes"]
    vector = size_embeddings(sizes[1:2], sizes[2:3], sizes[3:4])
    torch.testing.assert_close(vector.reshape(data["size_vector"].shape), data["size_vector"], atol=1e-6, rtol=0)
    assert vector.dtype == torch.float32


def test_module_tree_of_the_full_model(golden: Path) -> None:
    manifest = load_gzip(golden / "models_keys_sdxl.json.gz")
    with torch.device("meta"):
        model = SdxlUNet2DConditionModel()
    modules = {name: type(module).__name__ for name, module in model.named_modules() if name}
    assert modules == manifest["classes"]["unet"]
    assert list(modules) == manifest["module_order"]["unet"]
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(state.items()) == list(manifest["modules"]["unet"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_567_463_684


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_equals_diffusers(golden: Path, size: tuple[int, int]) -> None:
    from diffusers import UNet2DConditionModel as Theirs

    torch.manual_seed(0)
    theirs = Theirs.from_config(SMALL.to_diffusers()).eval()
    ours = unet_sdxl.from_config(dict(theirs.config)).eval()
    assert ours.config == SMALL
    state = theirs.state_dict()
    pairs = load_gzip(golden / "models_keys_sdxl.json.gz")["unet_pairs"]
    ours.load_state_dict({own: state[name] for own, name in pairs if name in state})
    sample, context = torch.randn(2, 4, *size), torch.randn(2, 77, SMALL.cross_attention_dim)
    pooled, timesteps = torch.randn(2, SMALL.pooled_dim), torch.tensor([999, 37])
    times = torch.tensor([[512.0, 768, 0, 32, 1024, 1024], [300, 200, 10, 0, 512, 640]])
    y = torch.cat([pooled, size_embeddings(*times.split(2, dim=1))], dim=1)
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": times}
        expected = theirs(sample, timesteps, context, added_cond_kwargs=added).sample
        torch.testing.assert_close(ours(sample, timesteps, context, y), expected, atol=1e-5, rtol=0)


def inputs(side: int = 8) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, side, side), torch.tensor([7, 900]), torch.randn(2, 77, 48), torch.randn(2, 1600)


def test_old_frequencies_are_a_setting() -> None:
    assert SdxlUNetConfig().freq_shift == 0
    assert SMALL.to_diffusers()["freq_shift"] == 0
    old = dataclasses.replace(SMALL, freq_shift=1.0)
    assert unet_sdxl.from_config(old.to_diffusers()).config == old


def test_config_refuses_what_it_cannot_compute() -> None:
    good = SMALL.to_diffusers()
    for change, word in [
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_time_embed_dim": 128}, "addition_time_embed_dim"),
        ({"use_linear_projection": False}, "use_linear_projection"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types"),
    ]:
        with pytest.raises(UserError, match=word):
            unet_sdxl.from_config(good | change)


def test_sizes_that_do_not_halve_evenly_are_a_sentence() -> None:
    model = unet_sdxl.from_config(SMALL).eval()
    _, timesteps, context, y = inputs()
    with pytest.raises(UserError, match=r"88x72 pixels does not fit.*multiples of 32"):
        model(torch.randn(2, 4, 9, 11), timesteps, context, y)


def test_inputs_that_do_not_belong_together() -> None:
    model = unet_sdxl.from_config(SMALL).eval()
    x, timesteps, context, y = inputs()
    with pytest.raises(ValueError, match="same batch"):
        model(x, timesteps, context, y[:1])
    with pytest.raises(ValueError, match="number format"):
        model(x, timesteps, context, y.double())


def recomputed(model: SdxlUNet2DConditionModel) -> int:
    """How many segments run a second time in the backward pass."""
    runs = dict.fromkeys(model.checkpoint_segments(), 0)

    def count(module, _inputs) -> None:
        runs[module] += 1

    hooks = [segment.register_forward_pre_hook(count) for segment in runs]
    model(*inputs()).mean().backward()
    for hook in hooks:
        hook.remove()
    return sum(number == 2 for number in runs.values())


def test_checkpointing_interval_and_modes() -> None:
    model = unet_sdxl.from_config(SMALL).train()
    segments = model.checkpoint_segments()
    kinds = [type(segment).__name__ for segment in segments]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "ResnetBlock2D": 17,
        "Downsample2D": 2,
        "Upsample2D": 2,
        "BasicTransformerBlock": 2 + 4 + 2 + 6 + 3,
    }
    assert recomputed(model) == 0
    model.enable_gradient_checkpointing()
    assert recomputed(model) == len(segments)
    model.enable_gradient_checkpointing(interval=3)
    assert recomputed(model) == -(-len(segments) // 3)
    assert recomputed(model.eval()) == 0
    model.train().disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing() and recomputed(model) == 0


def test_checkpointing_keeps_gradients() -> None:
    torch.manual_seed(0)
    model = unet_sdxl.from_config(SMALL).train()
    given, gradients = inputs(), []
    for interval in (0, 1, 2):
        if interval:
            model.enable_gradient_checkpointing(interval)
        model.zero_grad()
        model(*given).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_norms_compute_in_float32_when_their_weights_are() -> None:
    norm = unet_sdxl.GroupNorm32(4, 8)
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), torch.nn.functional.group_norm(x.float(), 4).to(torch.bfloat16))
    half = unet_sdxl.GroupNorm32(4, 8).bfloat16()
    assert torch.equal(half(x), torch.nn.functional.group_norm(x, 4, half.weight, half.bias, half.eps))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_and_autocast_run(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    model = unet_sdxl.from_config(SMALL).eval()
    x, timesteps, context, y = inputs()
    with torch.no_grad():
        expected = model(x, timesteps, context, y)
        model.to(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x.bfloat16(), timesteps, context.bfloat16(), y.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_attention_backends_agree(backend: str) -> None:
    torch.manual_seed(0)
    model = unet_sdxl.from_config(SMALL).eval()
    given = inputs()
    with torch.no_grad():
        expected = model(*given)
        model.set_attention_backend(backend)
        torch.testing.assert_close(model(*given), expected, atol=1e-5, rtol=0)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(*given), expected, atol=1e-5, rtol=0)


def test_replaced_forward_of_a_layer_is_called() -> None:
    model = unet_sdxl.from_config(SMALL).eval()
    calls = []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for name, module in layers.items():
        module.forward = lambda x, forward=module.forward, name=name: (calls.append(name), forward(x))[1]
    with torch.no_grad():
        model(*inputs())
    assert sorted(calls) == sorted(layers)


def test_old_path() -> None:
    from library import sdxl_original_unet as old

    assert old.SdxlUNet2DConditionModel is SdxlUNet2DConditionModel
    t = torch.tensor([3.0, 700])
    assert torch.equal(old.get_timestep_embedding(t, 8, 0), unet_sdxl.timestep_embedding(t, 8))
