"""Frozen weights in 8-bit floats: the products are those of the casted weights, and little is kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.models import unet_sd
from library.runtime.float8 import FLOAT8, LARGEST, hold_in_float8
from tests.runtime.test_runtime_policy import INPUTS, SMALL


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.Flatten(2),
        nn.Linear(16, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 12, bias=False),
        nn.Linear(12, 4),
    )
    return net.requires_grad_(False)


def test_products_and_gradients_are_those_of_the_casted_weights() -> None:
    held, casted = layers(), layers()
    assert hold_in_float8(held) == 4
    kept = [p.dtype == FLOAT8 for p in held.parameters()]
    assert [name for (name, _), small in zip(held.named_parameters(), kept, strict=True) if small] == [
        "1.weight",
        "2.weight",
        "4.weight",
        "6.weight",
    ]
    for own, other in zip(held.parameters(), casted.parameters(), strict=True):
        other.data = own.data.float()
    x, y = (torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8).requires_grad_() for _ in range(2))
    torch.testing.assert_close(held(x), casted(y))
    held(x).square().sum().backward()
    casted(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_backward_pass_keeps_8_bits() -> None:
    net = layers()
    hold_in_float8(net)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.ones(1, 4, 8, 8, requires_grad=True))
    weights = [t for t in kept if t.numel() in (8 * 8 * 9, 8 * 8, 16 * 12, 12 * 12) and t.dim() in (2, 4)]
    assert len([t for t in weights if t.dtype == FLOAT8]) == 4


def test_large_weights_stay_numbers() -> None:
    net = layers()
    net[1].weight.data.fill_(1000.0)
    hold_in_float8(net)
    assert net[1].weight.float().eq(LARGEST).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_keeps_its_face(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = unet_sd.from_config(SMALL).requires_grad_(False).to(dtype)
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in INPUTS]
    expected = model(*inputs).sample
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    assert hold_in_float8(model) > 20
    assert model.dtype == dtype
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    assert after < before * (0.35 if dtype.itemsize == 4 else 0.6)
    out = model(*inputs).sample
    assert out.dtype == dtype
    assert (out - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_autocast_decides_the_format() -> None:
    net = layers()
    hold_in_float8(net)
    seen = []
    net[1].register_forward_hook(lambda *values: seen.append(values[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.ones(1, 4, 8, 8))
    assert seen == [torch.bfloat16]


def test_weights_that_learn_are_left_alone() -> None:
    net = layers().requires_grad_(True)
    assert hold_in_float8(net) == 0
