"""The layers that the U-Nets of all Stable Diffusion families are made of.

Module order, class names and attribute names are those that network files and third parties look for. Linear
and convolution layers are plain torch modules called as `layer(x)`, so that adapters can replace their forward.

Shapes: B batch, C channels, H and W latent sides, N = H * W tokens, L context tokens, D token width.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.runtime.attention import BACKENDS, attention
from library.runtime.precision import cast_once

RESNET_EPS = 1e-5
TRANSFORMER_EPS = 1e-6
MAX_PERIOD = 10000


class SampleOutput:
    """A prediction behind the attribute `sample`."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


def run_segment(module: nn.Module, *inputs: Any) -> Any:
    """Call a module; recompute it in the backward pass when it is marked `checkpointed` and trains.

    What is kept for that (its inputs) waits in CPU memory when it is marked `offloaded` too.
    """
    if getattr(module, "checkpointed", False) and module.training and torch.is_grad_enabled():
        with _kept_on_cpu() if getattr(module, "offloaded", False) else contextlib.nullcontext():
            return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def _kept_on_cpu() -> contextlib.AbstractContextManager[Any]:
    # Pinned memory lets the copies run beside the computation.
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def timestep_embedding(
    timesteps: torch.Tensor, width: int, shift: float = 0.0, *, max_period: float = MAX_PERIOD, scale: float = 1.0
) -> torch.Tensor:
    """Sinusoids of timesteps (B,) -> float32 (B, width), cosines first; an odd width ends with a zero.

    The order of operations in float32 is part of the definition: float64 differs by up to 6e-5 at t = 999.
    """
    return _sinusoids(timesteps, _frequencies(width, shift, timesteps.device, max_period), width, scale)


def _frequencies(width: int, shift: float, device: torch.device, max_period: float = MAX_PERIOD) -> torch.Tensor:
    half = width // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - shift))


def _sinusoids(timesteps: torch.Tensor, frequencies: torch.Tensor, width: int, scale: float = 1.0) -> torch.Tensor:
    angles = timesteps.float()[:, None] * frequencies
    if scale != 1.0:
        angles = scale * angles
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


class Sinusoids:
    """`timestep_embedding` of one width; the frequencies are computed once a device and stay float32."""

    def __init__(self, width: int, shift: float = 0.0) -> None:
        self.width = width
        self.shift = shift
        self._cached: torch.Tensor | None = None

    def __call__(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self._cached is None or self._cached.device != timesteps.device:
            self._cached = _frequencies(self.width, self.shift, timesteps.device)
        return _sinusoids(timesteps, self._cached, self.width)


class Timesteps(nn.Module):
    """`Sinusoids` as a module without weights."""

    def __init__(self, num_channels: int, shift: float = 0.0) -> None:
        super().__init__()
        self.num_channels = num_channels
        self._sinusoids = Sinusoids(num_channels, shift)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self._sinusoids(timesteps)


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between: (B, in_channels) -> (B, time_embed_dim).

    Not called TimestepEmbedding as elsewhere: LyCORIS 4 takes that class (of another family) and the layers'
    names as two targets and stops on the duplicate.
    """

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    """Residual block with the time embedding added as a per-channel bias.

    Args:
        in_channels, out_channels: widths; a 1x1 `conv_shortcut` exists when they differ.
        time_embed_dim: width of the time embedding.
        norm_num_groups: groups of both norms.
    """

    checkpointed = False

    def __init__(
        self, in_channels: int, out_channels: int, *, time_embed_dim: int = 1280, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=RESNET_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) and (B, time_embed_dim) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(hidden_states)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return shortcut + h


class Downsample2D(nn.Module):
    """Halve both sides with a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels
        self.conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Double both sides (or go to a given size) by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        if output_size is None:
            return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))


class CrossAttention(nn.Module):
    """Multi-head attention over tokens; self-attention without a context.

    Args:
        query_dim: token width D.
        cross_attention_dim: width of the context, None for self-attention.
        heads, dim_head: number and size of the heads.
        upcast_attention: scores in float32 when the inputs are float16.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.scale = dim_head**-0.5
        self.upcast_attention = upcast_attention
        self.backend = "sdpa"
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, N, D) and optionally (B, L, context width) -> (B, N, D); `mask` as `attention` takes it."""
        hidden_states = cast_once(hidden_states)
        context = hidden_states if context is None else context.to(hidden_states.dtype)
        out = attention(
            self.to_q(hidden_states),
            self.to_k(context),
            self.to_v(context),
            self.heads,
            backend=self.backend,
            mask=mask,
            upcast=self.upcast_attention,
        )
        return self.to_out[0](out)

    def set_use_memory_efficient_attention(self, xformers: bool, mem_eff: bool) -> None:
        """Old switch: `xformers` picks that backend, anything else torch's own kernels."""
        set_attention_backend(self, "xformers" if xformers and not mem_eff else "sdpa")

    def set_use_sdpa(self, sdpa: bool) -> None:
        """Old switch: torch's own kernels, or the plain reference when switched off."""
        set_attention_backend(self, "sdpa" if sdpa else "plain")


class GEGLU(nn.Module):
    """Gated linear unit: the first half of the projection times gelu of the second."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](hidden_states))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each behind a layer norm and added."""

    checkpointed = False

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int | None,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        heads = {"heads": num_attention_heads, "dim_head": attention_head_dim, "upcast_attention": upcast_attention}
        self.attn1 = CrossAttention(dim, None, **heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, cross_attention_dim, **heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) and (B, L, context width) -> (B, N, D)."""
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), context=context) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it.

    Args:
        num_attention_heads, attention_head_dim: number and size of the heads.
        in_channels: width of the feature map.
        cross_attention_dim: width of the context.
        use_linear_projection: `proj_in` and `proj_out` are Linear instead of 1x1 convolutions.
        upcast_attention: see `CrossAttention`.
        num_transformer_layers: number of transformer blocks.
        norm_num_groups: groups of the norm at the start.
    """

    checkpointed = False

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        cross_attention_dim: int | None = None,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        num_transformer_layers: int = 1,
        *,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        inner = num_attention_heads * attention_head_dim
        in_channels = inner if in_channels is None else in_channels
        self.in_channels = in_channels
        self.num_attention_heads = num_attention_heads
        self.attention_head_dim = attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear_projection else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, num_attention_heads, attention_head_dim, cross_attention_dim, upcast_attention)
            for _ in range(num_transformer_layers)
        )
        self.proj_out = nn.Linear(inner, in_channels) if use_linear_projection else nn.Conv2d(inner, in_channels, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: Any = None,
        return_dict: bool = True,
    ) -> SampleOutput | tuple[torch.Tensor]:
        """(B, C, H, W) and (B, L, context width) -> (B, C, H, W); `timestep` is not used."""
        x = hidden_states
        height, width = x.shape[2:]
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.use_linear_projection else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = run_segment(block, h, encoder_hidden_states)
        if self.use_linear_projection:
            h = _to_map(self.proj_out(h), height, width, x)
        else:
            h = self.proj_out(_to_map(h, height, width, x))
        out = h + x
        return SampleOutput(out) if return_dict else (out,)


def _to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> contiguous (B, H * W, C); a view when x is channels-last."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def _to_map(x: torch.Tensor, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(B, H * W, C) -> (B, C, H, W) in the memory layout of `like`, so that one layout runs through the U-Net."""
    x = x.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
    return x.contiguous() if like.is_contiguous() else x


def set_attention_backend(module: nn.Module, backend: str) -> None:
    """Set the backend of every attention layer under `module` (itself included)."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}, known: {', '.join(BACKENDS)}")
    if backend == "xformers":
        from library.runtime.attention import require_xformers

        require_xformers()
    for layer in module.modules():
        if isinstance(layer, CrossAttention):
            layer.backend = backend
