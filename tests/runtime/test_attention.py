"""One attention function: backends agree, flags choose."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from library.messages import UserError
from library.runtime import attention as policy
from library.runtime.attention import attention, choose_backend


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 30, 48), (2, 77, 48), (2, 77, 48)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Head by head, in float64."""
    outputs = []
    for q_h, k_h, v_h in zip(*(x.double().chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = torch.einsum("bnd,bmd->bnm", q_h, k_h) / q_h.shape[-1] ** 0.5
        outputs.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), v_h))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_output_and_gradients(backend: str, heads: int) -> None:
    q, k, v = inputs()
    expected = reference(q, k, v, heads)
    out = attention(q, k, v, heads, backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=0)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for actual, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(actual, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [4, 8, 15, 16])
def test_small_heads_on_many_tokens(size: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2 * size, requires_grad=True) for n in (256, 77, 77))
    out, expected = attention(q, k, v, 2), reference(q, k, v, 2)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=0)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for actual, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(actual, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_split_heads_form(backend: str) -> None:
    q, k, v = inputs()
    split = [x.unflatten(-1, (3, 16)).transpose(1, 2) for x in (q, k, v)]
    out = attention(*split, backend=backend)
    assert out.shape == (2, 3, 30, 16)
    assert torch.equal(out.transpose(1, 2).flatten(2), attention(q, k, v, 3, backend=backend))


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_masks(backend: str) -> None:
    q, k, v = inputs()
    allowed = torch.arange(77) < 20
    expected = attention(q, k[:, :20], v[:, :20], 3, backend="plain")
    added = torch.zeros(77).masked_fill(~allowed, float("-inf"))
    for mask in (allowed, added):
        out = attention(q, k, v, 3, backend=backend, mask=mask[None, None, None])
        torch.testing.assert_close(out, expected, atol=3e-6, rtol=0)


def test_upcast_survives_scores_that_overflow_half() -> None:
    q, k, v = (x.detach() for x in inputs(torch.float16))
    q, k = q * 300, k * 300
    assert not attention(q, k, v, 3, backend="plain").isfinite().all()
    out = attention(q, k, v, 3, backend="plain", upcast=True)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), reference(q, k, v, 3), atol=2e-3, rtol=0)


def test_flags_choose() -> None:
    assert choose_backend() == "sdpa"
    assert choose_backend(sdpa=True) == choose_backend(mem_eff=True) == "sdpa"
    assert choose_backend(mem_eff=True, xformers=True) == "sdpa"


def test_missing_xformers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="xformers is not installed"):
        choose_backend(xformers=True)


def test_xformers_gets_contiguous_tokens_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q, k, v, attn_bias=None):
        assert all(x.is_contiguous() for x in (q, k, v)) and q.shape == (2, 30, 3, 16)
        split = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=attn_bias).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=kernel)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = inputs()
    out = attention(q, k, v, 3, backend="xformers")
    torch.testing.assert_close(out, attention(q, k, v, 3))


def test_kernel_order_is_left_alone_without_a_card() -> None:
    policy.set_kernel_order.cache_clear()
    policy.set_kernel_order()
