"""The forward in two kernels and its hand-written backward, against the plain form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.models.unet_sd import from_config
from networks import lora, low_rank
from tests.networks.network_models import FULL_UNETS

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear_without_bias": (lambda: nn.Linear(6, 5, bias=False), (2, 6)),
    "conv1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 3, 4)),
    "conv3": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 5, 4)),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, lora.LoRAModule, torch.Tensor]:
    """A frozen layer with an applied module of rank 3, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().to(dtype).requires_grad_(False)
    module = lora.LoRAModule("lora_unet_x", layer, 0.7, 3, 2.0).to(dtype)
    nn.init.normal_(module.lora_up.weight)
    module.apply_to()
    return layer, module, torch.randn(LAYERS[kind][1], dtype=dtype)


def plain(layer: nn.Module, module: lora.LoRAModule, x: torch.Tensor) -> torch.Tensor:
    """The definition: layer(x) + multiplier * alpha / rank * up(down(x))."""
    return type(layer).forward(layer, x) + module.lora_up(module.lora_down(x)) * 0.7 * 2.0 / 3


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_values_and_gradients(kind: str, memory: str) -> None:
    layer, module, x = make(kind, torch.float64)
    if memory == "channels_last":
        if x.dim() != 4:
            pytest.skip("pictures only")
        x, _ = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    elif memory == "strided":
        x = torch.stack([x, x], dim=-1)[..., 0]
    assert low_rank.can_fuse(layer) is False  # its forward has been taken over
    assert bool(module._fused_layer) == (kind != "conv3")
    results = []
    for forward in (layer, lambda given: plain(layer, module, given)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
        module.zero_grad()
        y = forward(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y, leaf.grad, module.lora_down.weight.grad, module.lora_up.weight.grad])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    parameters = (x.detach().clone().requires_grad_(True), module.lora_down.weight, module.lora_up.weight)
    assert torch.autograd.gradcheck(lambda given, down, up: layer(given), parameters)


@pytest.mark.parametrize("frozen", ["input", "down", "up"])
@pytest.mark.parametrize("kind", ["linear", "conv1"])
def test_only_what_is_needed_gets_a_gradient(kind: str, frozen: str) -> None:
    layer, module, x = make(kind, torch.float64)
    x.requires_grad_(frozen != "input")
    module.lora_down.weight.requires_grad_(frozen != "down")
    module.lora_up.weight.requires_grad_(frozen != "up")
    wanted = [t for t in (x, module.lora_down.weight, module.lora_up.weight) if t.requires_grad]
    ours = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.autograd.grad(plain(layer, module, x).square().sum(), wanted)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", list(LAYERS))
def test_mixed_formats(kind: str) -> None:
    """A float32 network on a bf16 layer, with autocast and without; gradients in the network's format."""
    layer, module, x = make(kind)
    expected = layer(x)
    layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
        assert mixed.dtype == torch.bfloat16
        inner = layer(x.bfloat16())
    torch.testing.assert_close(mixed.float(), expected, atol=0.08, rtol=0.02)
    torch.testing.assert_close(inner, mixed, atol=0.08, rtol=0.02)
    mixed.float().sum().backward()
    assert module.lora_down.weight.grad.dtype == module.lora_up.weight.grad.dtype == torch.float32
    alone = layer(x.bfloat16())
    assert alone.dtype == torch.bfloat16
    torch.testing.assert_close(alone.float(), expected, atol=0.08, rtol=0.02)
    module.to(torch.bfloat16)
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, atol=0.08, rtol=0.02)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    layer, module, x = make(kind, torch.float64)
    x.requires_grad_(True)
    wanted = (module.lora_down.weight, module.lora_up.weight)
    plainly = [g.clone() for g in torch.autograd.grad(layer(x).square().sum(), wanted)]
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, expected in zip(wanted, plainly, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_traced_as_one_graph(kind: str) -> None:
    layer, _, x = make(kind)
    traced = torch.compile(lambda given: layer(given) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), layer(x) * 2)


def test_a_trained_layer_and_a_foreign_forward_take_the_general_way() -> None:
    layer, _, x = make("linear")
    expected = layer(x)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None

    other = nn.Linear(6, 5)
    forward = other.forward
    other.forward = lambda given: forward(given) * 2
    second = lora.LoRAModule("lora_unet_y", other, 1.0, 3, 3.0)
    nn.init.normal_(second.lora_up.weight)
    second.apply_to()
    torch.testing.assert_close(other(x), forward(x) * 2 + second.lora_up(second.lora_down(x)))
    torch.testing.assert_close(layer(x), expected)


def test_networks_on_one_layer_add_up() -> None:
    layer, module, x = make("linear", torch.float64)
    second = lora.LoRAModule("lora_unet_y", layer, 1.0, 2, 1.0).to(torch.float64)
    nn.init.normal_(second.lora_up.weight)
    second.apply_to()
    expected = plain(layer, module, x) + second.lora_up(second.lora_down(x)) * 0.5
    torch.testing.assert_close(layer(x), expected)


def test_both_orientations_of_the_gradient_of_up() -> None:
    torch.manual_seed(0)
    up, hidden, grad = torch.randn(5, 3), torch.randn(3, 7), torch.randn(7, 5)
    expected = 0.3 * grad.t() @ hidden.t()
    for few_rows in (False, True):
        found = low_rank.grad_of_up(up, hidden, grad, 0.3, few_rows=few_rows)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous() != few_rows


VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "as_strided"}


class Kernels(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS and not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(unet: nn.Module) -> int:
    latents, text = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 77, 768, device="meta")
    with Kernels() as mode:
        unet(latents, torch.empty(1, device="meta"), text)
    return mode.count


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "8"}], ids=["linear", "conv"])
def test_two_kernels_a_module_at_full_size(arguments: dict[str, str]) -> None:
    """peft adds four, the original five."""
    with torch.device("meta"):
        unet = from_config(FULL_UNETS["sd15"]).requires_grad_(False)
        before = kernels(unet)
        network = lora.create_network(1.0, 16, 16, None, [], unet, **arguments)
        network.apply_to([], unet, True, True)
        network.train()
        added = kernels(unet) - before
    assert 0 < added <= 2 * len(network.unet_loras)
