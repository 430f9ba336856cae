"""Memory of an SDXL LoRA step, computed from shapes without a graphics card.

    python -m benchmarks.sdxl_memory [--size 1024] [--batch 1] [--rank 16]

The full-size U-Net with `networks.lora` runs a forward and a backward pass on torch's meta device. Every tensor that
the pass makes is counted for as long as it lives, so activations, recomputed blocks and temporary tensors are all in
the peak. Norms run in float32 and everything else in bfloat16, as autocast has it on a card; attention keeps
what the fused kernels keep (queries, keys, values, output and one number a row). Not counted: the context of the
driver (about 0.5 GiB), workspaces of kernels, and what the allocator rounds up.
"""

from __future__ import annotations

import argparse
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import add_own_lora
from library.models.unet_sdxl import SdxlUNet2DConditionModel
from library.runtime import precision
from library.runtime.wrap import WrapPolicy, wrap_model
from networks import low_rank

GIB = 2**30
LOW = torch.bfloat16
FORMATS = (
    *((F, name, torch.float32) for name in ("group_norm", "layer_norm")),
    *((F, name, LOW) for name in ("linear", "conv2d")),
    *((torch, name, LOW) for name in ("addmm", "mm", "matmul")),
)
# Bytes that an optimizer keeps for a parameter of the network.
OPTIMIZERS = {"AdamW": 8, "8-bit AdamW": 2}
# Parameters of what may lie beside the U-Net, in millions.
TEXT_ENCODERS, VAE = 123.1 + 694.7, 83.7


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        """`there`: tensors that are counted elsewhere, so that views of them are not."""
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


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps and makes."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextlib.contextmanager
def as_on_a_card() -> Iterator[None]:
    """Norms in float32, products in bfloat16, as autocast has it; meta tensors know no autocast."""
    with contextlib.ExitStack() as stack:
        for module, name, dtype in FORMATS:
            stack.enter_context(mock.patch.object(module, name, cast_inputs(getattr(module, name), dtype)))
        for module in (precision, low_rank):
            stack.enter_context(mock.patch.object(module, "autocast_dtype", lambda _: LOW))
        fused = cast_inputs(FusedAttention.apply, LOW)
        attention = mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: fused(q, k, v))
        stack.enter_context(attention)
        yield


def cast_inputs(function: Callable, dtype: torch.dtype) -> Callable:
    def cast_and_call(*args: Any, **kwargs: Any) -> Any:
        return function(*(cast(a, dtype) for a in args), **{k: cast(v, dtype) for k, v in kwargs.items()})

    return cast_and_call


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def step_bytes(size: int, batch: int, rank: int, interval: int) -> tuple[int, int, int]:
    """(U-Net weights, parameters of the network, peak of a forward and backward pass beside the weights)."""
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel().requires_grad_(False)
    wrap_model(unet, WrapPolicy(device="meta", dtype=LOW), family="sdxl")
    subject = add_own_lora(unet, rank, "meta")
    wrap_model(unet, WrapPolicy(device="meta", checkpointing_interval=interval), family="sdxl")
    unet.train()
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    side = size // 8
    with torch.device("meta"):
        latents, times = torch.empty(batch, 4, side, side, dtype=LOW), torch.empty(batch, dtype=torch.int64)
        context, vector = torch.empty(batch, 77, 2048, dtype=LOW), torch.empty(batch, 2816, dtype=LOW)
    live = Live([*unet.parameters(), *subject.parameters])
    with live, as_on_a_card():
        unet(latents, times, context, vector).float().square().mean().backward()
    return weights, sum(p.numel() for p in subject.parameters), live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="pictures a step")
    parser.add_argument("--rank", type=int, default=16, help="network_dim")
    args = parser.parse_args()
    print(f"SDXL LoRA, rank {args.rank}, {args.size}x{args.size}, bfloat16, caches for latents and text; GiB")
    print("| batch | checkpointing | U-Net | network | step | sum with AdamW | sum with 8-bit AdamW |")
    print("|---" * 7 + "|")
    for batch in args.batch:
        for interval, word in ((1, "every block"), (2, "every second block"), (0, "off")):
            weights, parameters, peak = step_bytes(args.size, batch, args.rank, interval)
            network = parameters * 4
            sums = [(weights + network + peak + parameters * kept) / GIB for kept in OPTIMIZERS.values()]
            cells = [weights / GIB, network / GIB, peak / GIB, *sums]
            print(f"| {batch} | {word} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    print(f"text encoders in bfloat16 {TEXT_ENCODERS * 2e6 / GIB:.1f}, VAE in float32 {VAE * 4e6 / GIB:.1f} GiB more")


if __name__ == "__main__":
    main()
