"""Memory of a forward and backward pass, counted from shapes alone: the pass runs on torch's meta device.

Every tensor that the pass makes is counted for as long as it lives, so kept activations, recomputed blocks and
temporary tensors are all in the peak. Not counted: the driver's own memory, workspaces of kernels, and what the
allocator rounds up. Attention keeps what the fused kernels keep (queries, keys, values, output and one number a row).
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.runtime.precision import pretended_autocast

# What autocast computes in float32 and in half precision; the rest follows its inputs.
IN_FLOAT32 = ((F, "group_norm"), (F, "layer_norm"))
IN_HALF = ((F, "linear"), (F, "conv2d"), (torch, "addmm"), (torch, "baddbmm"), (torch, "mm"), (torch, "matmul"))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as a context manager.

    Args:
        there: tensors that are counted elsewhere, so that views of them are not.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextlib.contextmanager
def as_on_a_device(dtype: torch.dtype | None) -> Iterator[None]:
    """What devices do and "meta" does not: autocast, and attention that keeps no matrix of scores.

    torch's functions are replaced for a while, in all threads: a mode would not reach the backward pass.

    Args:
        dtype: of autocast; None without it.
    """
    with contextlib.ExitStack() as stack:
        attention = _casting(_FusedAttention.apply, dtype)
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v)))
        for functions, wanted in ((IN_FLOAT32, torch.float32), (IN_HALF, dtype)):
            for module, name in functions if dtype is not None else ():
                stack.enter_context(_replaced(module, name, _casting(getattr(module, name), wanted)))
        stack.enter_context(pretended_autocast(dtype))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps and makes."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _casting(function: Callable, dtype: torch.dtype | None) -> Callable:
    """The function with floating-point tensors among its arguments in one format."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and dtype is not None else value

    def cast_and_call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return cast_and_call


def on_meta(modules: Sequence[nn.Module], others: Iterable[nn.Module] = ()) -> tuple[list[nn.Module], dict[int, Any]]:
    """Copies of modules without memory, adapters on their layers included.

    Args:
        others: modules that the copies reach by references only (networks on their layers).

    Returns:
        The copies, and the table id of an original tensor -> its copy.
    """
    table: dict[int, Any] = {}
    for module in (*modules, *others):
        for parameter in module.parameters():
            table[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in module.buffers():
            table[id(buffer)] = torch.empty_like(buffer, device="meta")
    memo = dict(table)  # grows by everything else that is copied
    return [copy.deepcopy(module, memo) for module in modules], table
