"""One attention function and the policy that picks its backend.

Backends: `sdpa` (torch's fused kernels; the default, and what `--mem_eff_attn` gets, because torch's
memory-efficient kernel is one of them), `xformers`, and `plain` (matrix products and a softmax, for reference).
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F

from library.messages import UserError

BACKENDS = ("sdpa", "xformers", "plain")
# MKL multiplies matrices with an inner side of 16 faster than with one of 4 or 8 (1.6x over a whole attention layer,
# measured); below this many scores the two copies cost what is won.
CPU_HEAD_SIZE = 16
CPU_PADDED_FROM = 2**14


def choose_backend(*, xformers: bool = False, mem_eff: bool = False, sdpa: bool = False) -> str:
    """The backend that the attention flags ask for: mem_eff before xformers before sdpa, sdpa without any.

    Raises:
        UserError: xformers was asked for and is not installed.
    """
    if xformers and not mem_eff:
        require_xformers()
        return "xformers"
    return "sdpa"


def require_xformers() -> None:
    """Raise a UserError when the xformers package is missing."""
    if importlib.util.find_spec("xformers") is None:
        raise UserError("--xformers: the package xformers is not installed", "pip install xformers, or use --sdpa")


@functools.lru_cache(maxsize=1)
def set_kernel_order() -> None:
    """Let SDPA try cuDNN's kernel first on Hopper and later cards, where it is the fastest (once a process)."""
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability()[0] < 9:
        return
    set_order = getattr(torch._C, "_set_sdp_priority_order", None)
    if set_order is None:  # torch < 2.6 has no order to set
        return
    from torch.nn.attention import SDPBackend as B

    torch.backends.cuda.enable_cudnn_sdp(True)
    set_order([int(b) for b in (B.CUDNN_ATTENTION, B.FLASH_ATTENTION, B.EFFICIENT_ATTENTION, B.MATH)])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int | None = None,
    *,
    backend: str = "sdpa",
    mask: torch.Tensor | None = None,
    upcast: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(size)) v per head.

    Args:
        q, k, v: (B, N, heads * size) with `heads` given, or (B, heads, N, size); k and v may have another N.
        backend: one of `BACKENDS`.
        mask: added to the scores when float, True = attend when boolean; broadcast to (B, heads, Nq, Nk).
        upcast: compute scores in float32 when the inputs are float16 (models that overflow otherwise).

    Returns:
        In the form and dtype of the inputs.
    """
    if heads is not None:
        batch, length, width = q.shape
        size = width // heads
        q = q.view(batch, length, heads, size).transpose(1, 2)
        k = k.view(batch, -1, heads, size).transpose(1, 2)
        v = v.view(batch, -1, heads, size).transpose(1, 2)
    out = _upcast(q, k, v, backend, mask) if upcast and q.dtype == torch.float16 else _run(q, k, v, backend, mask)
    return out if heads is None else out.transpose(1, 2).reshape(batch, length, width)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, mask: torch.Tensor | None) -> torch.Tensor:
    if backend == "sdpa":
        if q.shape[-1] < CPU_HEAD_SIZE and q.is_cpu and q.shape[-2] * k.shape[-2] >= CPU_PADDED_FROM:
            return _padded(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return (_xformers if backend == "xformers" else _plain)(q, k, v, mask)


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """SDPA with heads filled up with zeros, which change no score."""
    size = q.shape[-1]
    q, k, v = (F.pad(x, (0, CPU_HEAD_SIZE - size)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=size**-0.5)[..., :size]


def _upcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, mask: torch.Tensor | None) -> torch.Tensor:
    # Autocast would take the float32 inputs back to float16.
    with torch.autocast(q.device.type, enabled=False):
        return _run(q.float(), k.float(), v.float(), backend, mask).to(v.dtype)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    import xformers.ops

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1) @ v
