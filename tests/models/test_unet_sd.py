"""The SD U-Net against recorded numbers, recorded module lists, and diffusers' U-Net."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from library.messages import UserError
from library.models import unet_sd
from library.models.layers import CrossAttention, ResnetBlock2D, Timesteps, Transformer2DModel, timestep_embedding
from library.models.unet_config import UNetConfig
from library.models.unet_sd import UNet2DConditionModel

LATER = {
    # An upscaling pass of the generation scripts ("deep shrink") resizes features between levels.
    "a.out_deepshrink_d0_t400",
    "a.out_deepshrink_d0_t999",
    "a.out_deepshrink_d1_t400",
    "a.out_deepshrink_d1_t999",
    "a.out_deepshrink_d1_d2_t400",
    "a.out_deepshrink_d1_d2_t999",
}
# Shows the fault of adding ControlNet residuals in place; `a.out_control_fixed` is what is wanted.
FAULTY = {"a.out_control"}
TOLERANCE = 2e-5

SHAPES = {
    "sd1": UNetConfig(block_out_channels=(64, 128, 128, 128), cross_attention_dim=128),
    "sd2": UNetConfig(
        block_out_channels=(64, 128, 128, 128),
        cross_attention_dim=128,
        attention_head_dim=(1, 2, 2, 2),
        use_linear_projection=True,
    ),
}
SMALL = UNetConfig(block_out_channels=(32, 64, 64, 64), norm_num_groups=16, cross_attention_dim=64)
UNEVEN = UNetConfig(
    block_out_channels=(32, 64, 96),
    norm_num_groups=8,
    layers_per_block=1,
    cross_attention_dim=48,
    attention_head_dim=(2, 4, 4),
    transformer_layers_per_block=(1, 2, 1),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    in_channels=5,
    out_channels=3,
)


def load_gzip(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def rule_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The weight of the recorded tiny models for a Stability key of the U-Net."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    x = np.random.RandomState(seed).standard_normal(shape)
    if key.endswith("bias"):
        x = 0.02 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def tiny_unet(golden: Path, kind: str) -> UNet2DConditionModel:
    manifest = load_gzip(golden / f"models_keys_{'sd15' if kind == 'sd1' else 'sd21'}.json.gz")
    shapes = load_gzip(golden / "models_tiny_keys.json.gz")["models"][kind]["keys"]
    model = unet_sd.from_config(SHAPES[kind])
    own = model.state_dict()
    weights = {}
    for key, part, (name, *_), _transform in manifest["pairs"]:
        if part == "unet" and key in shapes:  # equal widths need no shortcut
            weight = rule_weight(key, shapes[key][0])
            assert hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:8] == shapes[key][1], key
            weights[name] = weight.reshape(own[name].shape)
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def tiny(request: pytest.FixtureRequest, golden: Path) -> tuple[UNet2DConditionModel, dict[str, torch.Tensor]]:
    return tiny_unet(golden, request.param), load_file(golden / f"models_tiny_unet_{request.param}.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0, msg=lambda text: f"{name}: {text}")


def check_case_a(model: UNet2DConditionModel, data: dict[str, torch.Tensor]) -> set[str]:
    sample = data["a.sample"].requires_grad_()
    context = data["a.context"].requires_grad_()
    hidden = {name[len("a.hidden.") :] for name in data if name.startswith("a.hidden.")}
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str):
        def hook(_module, _inputs, output) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in hidden]
    out = model(sample, data["a.timesteps"], context).sample
    for hook in hooks:
        hook.remove()
    grads = torch.autograd.grad(out.square().mean(), [sample, context])
    close(out, data["a.out"], "a.out")
    close(grads[0], data["a.grad_sample"], "a.grad_sample")
    close(grads[1], data["a.grad_context"], "a.grad_context")
    for name in hidden:
        # Inside the U-Net values reach tens, so the tolerance follows their size.
        scale = max(1.0, data[f"a.hidden.{name}"].abs().max().item())
        close(outputs[name] / scale, data[f"a.hidden.{name}"] / scale, name)
    names = {"sample", "timesteps", "context", "out", "grad_sample", "grad_context"}
    return {f"a.{name}" for name in names} | {f"a.hidden.{name}" for name in hidden}


def skip_shapes(model: UNet2DConditionModel, sample: torch.Tensor, context: torch.Tensor) -> list[torch.Size]:
    shapes = []
    hooks = [model.conv_in.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))]
    for block in model.down_blocks:
        hooks.append(block.register_forward_hook(lambda _m, _i, out: shapes.extend(s.shape for s in out[1])))
    with torch.no_grad():
        model(sample, 0, context)
    for hook in hooks:
        hook.remove()
    return shapes


def normal(seed: int, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(0.1 * np.random.RandomState(seed).standard_normal(tuple(shape))).float()


def check_control(model: UNet2DConditionModel, data: dict[str, torch.Tensor]) -> set[str]:
    sample, context = data["a.sample"].detach(), data["a.context"].detach()
    shapes = skip_shapes(model, sample, context)
    residuals = tuple(normal(100 + i, shape) for i, shape in enumerate(shapes))
    middle = normal(200, shapes[-1])
    with torch.no_grad():
        out = model(
            sample,
            data["a.timesteps"],
            context,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample
    close(out, data["a.out_control_fixed"], "a.out_control_fixed")
    assert not torch.allclose(out, data["a.out_control"], atol=1e-3), "residuals leak into the middle block"
    return {"a.out_control_fixed"}


def check_case_b(model: UNet2DConditionModel, data: dict[str, torch.Tensor]) -> set[str]:
    with torch.no_grad():
        close(model(data["b.sample"], int(data["b.timestep"]), data["b.context"]).sample, data["b.out"], "b.out")
        (fraction,) = model(data["b.sample"], 37.5, data["b.context"], return_dict=False)
    close(fraction, data["b.out_t37.5"], "b.out_t37.5")
    return {"b.sample", "b.timestep", "b.context", "b.out", "b.out_t37.5"}


def test_recorded_outputs(tiny: tuple[UNet2DConditionModel, dict[str, torch.Tensor]]) -> None:
    model, data = tiny
    seen = check_case_a(model, data) | check_control(model, data) | check_case_b(model, data)
    assert set(data) - seen - FAULTY - LATER == set()


def test_later_list_names_cases_that_exist(golden: Path) -> None:
    assert set(load_file(golden / "models_tiny_unet_sd1.safetensors")) >= LATER | FAULTY


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_attention_backends_agree(tiny: tuple, backend: str) -> None:
    model, data = tiny
    model.set_attention_backend(backend)
    with torch.no_grad():
        close(model(data["a.sample"], data["a.timesteps"], data["a.context"]).sample, data["a.out"], backend)
    model.set_attention_backend("sdpa")


def test_time_embedding(golden: Path) -> None:
    data = load_file(golden / "models_time_embedding.safetensors")
    t = data["t"]
    cases = {"sd_320": (320, 0.0), "sdxl_320": (320, 1.0), "sdxl_320_fixed": (320, 0.0), "odd_5": (5, 1.0)}
    for name, (width, shift) in cases.items():
        torch.testing.assert_close(timestep_embedding(t, width, shift), data[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(Timesteps(width, shift)(t), data[name], atol=1e-6, rtol=0)
    each = [timestep_embedding(column, 256) for column in data["sizes"].T]
    torch.testing.assert_close(torch.cat(each, dim=1), data["size_256"], atol=1e-6, rtol=0)
    assert set(data) == {*cases, "t", "sizes", "size_256", "size_vector"}  # the last: test_unet_sdxl.py


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_module_tree_of_the_full_model(golden: Path, kind: str) -> None:
    manifest = load_gzip(golden / f"models_keys_{kind}.json.gz")
    heads = 8 if kind == "sd15" else (5, 10, 20, 20)
    with torch.device("meta"):
        model = UNet2DConditionModel(
            64, heads, 768 if kind == "sd15" else 1024, kind == "sd21", upcast_attention=kind == "sd21"
        )
    modules = {name: type(module).__name__ for name, module in model.named_modules() if name}
    # The one class name that departs: LyCORIS 4 takes the recorded one for a target of another family.
    assert modules == manifest["classes"]["unet"] | {"time_embedding": "TimeEmbedding"}
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(state.items()) == list(manifest["modules"]["unet"].items())
    if "module_order" in manifest:
        assert list(modules) == manifest["module_order"]["unet"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == (859_520_964 if kind == "sd15" else 865_910_724)


@pytest.mark.parametrize("config", [SHAPES["sd1"], SHAPES["sd2"], SMALL, UNEVEN], ids=["sd1", "sd2", "small", "uneven"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 7)])
def test_equals_diffusers(config: UNetConfig, size: tuple[int, int]) -> None:
    from diffusers import UNet2DConditionModel as Theirs

    torch.manual_seed(0)
    theirs = Theirs.from_config(config.to_diffusers()).eval()
    ours = unet_sd.from_config(dict(theirs.config)).eval()
    assert ours.config == config
    ours.load_state_dict(theirs.state_dict())
    sample = torch.randn(2, config.in_channels, *size)
    timesteps, context = torch.tensor([999, 37]), torch.randn(2, 77, config.cross_attention_dim)
    with torch.no_grad():
        expected = theirs(sample, timesteps, context).sample
        torch.testing.assert_close(ours(sample, timesteps, context).sample, expected, atol=1e-5, rtol=0)


def test_config_refuses_what_it_cannot_compute() -> None:
    good = SMALL.to_diffusers()
    for change, word in [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"norm_num_groups": 24}, "groups"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4, "up_block_types": None}, "AttnDownBlock2D"),
        ({"attention_head_dim": 5}, "heads"),
    ]:
        with pytest.raises(UserError, match=word):
            unet_sd.from_config(good | change)


def test_sample_size_is_required() -> None:
    with pytest.raises(ValueError, match="sample_size"):
        UNet2DConditionModel()


def recomputed(model: UNet2DConditionModel) -> list[str]:
    """Names of the segments that run a second time in the backward pass."""
    runs: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def count(module, _inputs) -> None:
        runs[names[module]] = runs.get(names[module], 0) + 1

    hooks = [segment.register_forward_pre_hook(count) for segment in model.checkpoint_segments()]
    model(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 64)).sample.mean().backward()
    for hook in hooks:
        hook.remove()
    return [name for name, number in runs.items() if number == 2]


def test_checkpointing_interval_and_modes() -> None:
    model = unet_sd.from_config(SMALL).train()
    segments = model.checkpoint_segments()
    assert len(segments) == 22 + 16
    assert {type(s) for s in segments} == {ResnetBlock2D, Transformer2DModel}
    assert recomputed(model) == []
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing()
    assert len(recomputed(model)) == len(segments)
    model.enable_gradient_checkpointing(interval=3)
    assert len(recomputed(model)) == -(-len(segments) // 3)
    assert recomputed(model.eval()) == []
    model.train().set_gradient_checkpointing(False)
    assert not model.is_gradient_checkpointing() and recomputed(model) == []


def test_checkpointing_keeps_gradients_without_an_input_that_needs_them() -> None:
    torch.manual_seed(0)
    model = unet_sd.from_config(SMALL).train()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 64)
    gradients = []
    for interval in (0, 1, 2):
        if interval:
            model.enable_gradient_checkpointing(interval)
        model.zero_grad()
        model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_old_attention_switches() -> None:
    model = unet_sd.from_config(SMALL)
    layers = [module for module in model.modules() if isinstance(module, CrossAttention)]

    def backends() -> set[str]:
        return {layer.backend for layer in layers}

    assert backends() == {"sdpa"}
    model.set_use_sdpa(False)
    assert backends() == {"plain"}
    model.set_use_memory_efficient_attention(False, True)
    assert backends() == {"sdpa"}
    with pytest.raises(NotImplementedError):
        model.set_attention_slice(1)


def test_replaced_forward_of_a_layer_is_called() -> None:
    model = unet_sd.from_config(SMALL).eval()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            forward = module.forward
            module.forward = lambda x, forward=forward, name=name: (calls.append(name), forward(x))[1]
    with torch.no_grad():
        model(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 64))
    expected = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert sorted(calls) == sorted(expected)


def test_channels_last_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = unet_sd.from_config(SMALL).eval()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([5]), torch.randn(2, 77, 64)
    with torch.no_grad():
        expected = model(*inputs).sample
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-5, rtol=0)


def test_bfloat16_and_autocast_run() -> None:
    torch.manual_seed(0)
    model = unet_sd.from_config(SMALL).eval()
    sample, timesteps, context = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, 64)
    with torch.no_grad():
        expected = model(sample, timesteps, context).sample
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(sample, timesteps, context).sample
        half = model.to(torch.bfloat16)(sample.bfloat16(), timesteps, context.bfloat16()).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0)
