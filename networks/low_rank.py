"""Forward and backward of a frozen layer with a low-rank update: `y = layer(x) + scale * up(down(x))`.

The update costs two forward kernels. Where the layer is a plain frozen `Linear` or 1x1 `Conv2d` (most of a
network), layer and update are one autograd function with a hand-written backward: nothing of the layer's output
or of the input's size is copied, scaled or added in a kernel of its own, and no scale costs a kernel.
Elsewhere (3x3 convolutions, layers that another network or a foreign program has taken over, torch.compile) the
same two kernels are added and autograd does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.runtime.precision import autocast_dtype


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a convolution is a plain matrix product over pixels."""
    return (
        tuple(layer.kernel_size) == (1, 1)
        and tuple(layer.stride) == (1, 1)
        and layer.padding in ((0, 0), 0, "valid")
        and layer.groups == 1
    )


def can_fuse(layer: nn.Module) -> bool:
    """Whether layer and update may be computed as one function: torch's own layer, its forward not replaced."""
    forward = getattr(layer.forward, "__func__", None)
    if type(layer) is nn.Linear:
        return forward is nn.Linear.forward
    return type(layer) is nn.Conv2d and forward is nn.Conv2d.forward and is_pointwise(layer)


def fused(x: Tensor, layer: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`layer(x) + scale * up(down(x))` for a layer that `can_fuse` and whose weight is frozen.

    Args:
        x: (..., in) for Linear, (B, in, H, W) for Conv2d.
        down, up: (r, in[, 1, 1]) and (out, r[, 1, 1]); of any float dtype, cast to that of the computation.
    """
    if type(layer) is nn.Linear:
        return _Rows.apply(x, layer.weight, layer.bias, down, up, scale)
    if x.is_contiguous():
        return _Pixels.apply(x, layer.weight, layer.bias, down, up, scale)
    rows = x.permute(0, 2, 3, 1)  # channels-last memory: pixels are rows without a copy
    return _Rows.apply(rows, layer.weight, layer.bias, down, up, scale).permute(0, 3, 1, 2)


def add_to_rows(base: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """`base + scale * hidden up^T` in one kernel: base (..., out), hidden (..., r), up (out, r)."""
    rows = torch.addmm(base.reshape(-1, base.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scale)
    return rows.view(base.shape)


def add_to_pixels(base: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """`base + scale * up(hidden)` in one kernel: base (B, out, H, W), hidden (B, r, H, W), up (out, r, 1, 1)."""
    up = up.flatten(1)
    if base.is_contiguous():
        batch = base.shape[0]
        return torch.baddbmm(
            base.flatten(2), up.expand(batch, -1, -1), hidden.reshape(batch, hidden.shape[1], -1), alpha=scale
        ).view(base.shape)
    return add_to_rows(base.permute(0, 2, 3, 1), hidden.permute(0, 2, 3, 1), up, scale).permute(0, 3, 1, 2)


def match(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype, unless autocast does that by itself."""
    if weight.dtype == x.dtype or autocast_dtype(x) is not None:
        return weight
    return weight.to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype(x) or x.dtype


class _Rows(torch.autograd.Function):
    """The function over rows: x (..., in) -> (..., out).

    The hidden values lie transposed, (r, N): matrix products with few rows are several times faster on a CPU than
    those with few columns. Products with `beta=0` ignore their first operand and carry the scale for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype
        rows, frozen, a, b = _as(x, dtype), _matrix(weight, dtype), _matrix(down, dtype), _matrix(up, dtype)
        if x.dim() != 2:
            rows = rows.reshape(-1, x.shape[-1])
        out = rows.mm(frozen.t()) if bias is None else torch.addmm(_as(bias, dtype), rows, frozen.t())
        hidden = a.mm(rows.t())
        out.addmm_(hidden.t(), b.t(), alpha=scale)
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, weight, a, b, hidden)
        ctx.scale, ctx.like = scale, (x.dtype, down.dtype, down.shape, up.dtype, up.shape)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, hidden = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        shape, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        grad_x = grad_down = grad_up = None
        if needs_up:
            grad_up = grad_of_up(b, hidden, grad, ctx.scale, few_rows=grad.is_cpu)
        if needs_x or needs_down:
            grad_hidden = b.t().mm(grad.t())
            if needs_down:
                grad_down = torch.addmm(a, grad_hidden, rows, beta=0, alpha=ctx.scale)
            if needs_x:
                grad_x = grad.mm(_matrix(weight, grad.dtype)).addmm_(grad_hidden.t(), a, alpha=ctx.scale)
                grad_x = grad_x.view(*shape, -1)
        return _results(ctx, grad_x, grad_down, grad_up)


class _Pixels(torch.autograd.Function):
    """The function over contiguous pictures: x (B, in, H, W) -> (B, out, H, W)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype, batch = autocast_dtype(x) or x.dtype, x.shape[0]
        picture, a, b = _as(x, dtype), _matrix(down, dtype), _matrix(up, dtype)
        pixels = picture.flatten(2)
        # A channels-last weight would give a channels-last output, which the update could not be added to in place.
        out = F.conv2d(picture, _as(weight, dtype), None if bias is None else _as(bias, dtype)).contiguous()
        hidden = torch.bmm(a.expand(batch, -1, -1), pixels)
        out.flatten(2).baddbmm_(b.expand(batch, -1, -1), hidden, alpha=scale)
        ctx.save_for_backward(pixels if ctx.needs_input_grad[3] else None, weight, a, b, hidden)
        ctx.scale, ctx.like = scale, (x.dtype, down.dtype, down.shape, up.dtype, up.shape)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pixels, weight, a, b, hidden = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        batch, sides = grad.shape[0], grad.shape[2:]
        grad = grad.flatten(2)
        grad_x = grad_down = grad_up = None
        if needs_up:
            grad_up = _batch_product(b, grad, hidden, ctx.scale)
        if needs_x or needs_down:
            grad_hidden = torch.bmm(b.t().expand(batch, -1, -1), grad)
            if needs_down:
                grad_down = _batch_product(a, grad_hidden, pixels, ctx.scale)
            if needs_x:
                grad_x = torch.bmm(_matrix(weight, grad.dtype).t().expand(batch, -1, -1), grad)
                grad_x.baddbmm_(a.t().expand(batch, -1, -1), grad_hidden, alpha=ctx.scale)
                grad_x = grad_x.unflatten(2, sides)
        return _results(ctx, grad_x, grad_down, grad_up)


def grad_of_up(up: Tensor, hidden: Tensor, grad: Tensor, scale: float, *, few_rows: bool) -> Tensor:
    """`scale * grad^T hidden^T`: hidden (r, N), grad (N, out) -> (out, r).

    With `few_rows` as a transposed product, faster on a CPU than the copy into the parameter's layout that follows
    costs; elsewhere that copy is a kernel saved.
    """
    if few_rows:
        return torch.addmm(up.t(), hidden, grad, beta=0, alpha=scale).t()
    return torch.addmm(up, grad.t(), hidden.t(), beta=0, alpha=scale)


def _batch_product(like: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Sum over the batch of `scale * left right^T`: (B, m, P), (B, n, P) -> (m, n), the shape of `like`."""
    products = torch.baddbmm(like, left, right.mT, beta=0, alpha=scale)
    return products[0] if products.shape[0] == 1 else products.sum(0)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)` without the call where there is nothing to do: it counts on a GPU that waits for the host."""
    return x if x.dtype == dtype else x.to(dtype)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in[, 1, 1]) -> (out, in) in a dtype."""
    return _as(weight if weight.dim() == 2 else weight.flatten(1), dtype)


def _results(ctx: Any, grad_x: Tensor | None, grad_down: Tensor | None, grad_up: Tensor | None) -> tuple[Any, ...]:
    """The gradients in the dtypes and shapes of what they belong to."""
    x_dtype, down_dtype, down_shape, up_dtype, up_shape = ctx.like
    return (
        None if grad_x is None else _as(grad_x, x_dtype),
        None,
        None,
        None if grad_down is None else _as(grad_down.view(down_shape), down_dtype),
        None if grad_up is None else _as(grad_up.view(up_shape), up_dtype),
        None,
    )
