"""Attention under its old names: exact softmax attention, now computed by `library.runtime.attention`."""

from __future__ import annotations

from typing import Any

import torch

from library.models.layers import timestep_embedding
from library.runtime.attention import attention


class FlashAttentionFunction:
    """`apply(q, k, v, mask, causal, q_bucket_size, k_bucket_size)` on (B, heads, N, size) tensors."""

    @staticmethod
    def apply(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        q_bucket_size: int = 512,
        k_bucket_size: int = 1024,
    ) -> torch.Tensor:
        """Exact attention; `mask` (B, N of k) is True where keys are attended to; tile sizes have no effect."""
        allowed = None if mask is None else mask[:, None, None, :]
        if causal:
            lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
            lower = lower.tril(k.shape[-2] - q.shape[-2])
            allowed = lower if allowed is None else allowed & lower
        return attention(q, k, v, mask=allowed)


class FlashAttnProcessor:
    """The same as a diffusers attention processor; `attn.hypernetwork` may make other inputs for k and v."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        context = context.to(hidden_states.dtype)
        key_input, value_input = context, context
        if getattr(attn, "hypernetwork", None) is not None:
            key_input, value_input = attn.hypernetwork.forward(hidden_states, context)
        q, k, v = attn.to_q(hidden_states), attn.to_k(key_input), attn.to_v(value_input)
        out = attn.to_out[0](attention(q, k, v, attn.heads))
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


def get_parameter_dtype(parameter: torch.nn.Module) -> torch.dtype:
    """dtype of a module's first parameter."""
    return next(parameter.parameters()).dtype


def get_parameter_device(parameter: torch.nn.Module) -> torch.device:
    """Device of a module's first parameter."""
    return next(parameter.parameters()).device


def get_timestep_embedding(
    timesteps: torch.Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> torch.Tensor:
    """Sinusoids (B, embedding_dim) in float32: sines first unless `flip_sin_to_cos`, angles times `scale`."""
    embedding = timestep_embedding(timesteps, embedding_dim, downscale_freq_shift, max_period=max_period, scale=scale)
    if flip_sin_to_cos:
        return embedding
    half = embedding_dim // 2
    return torch.cat([embedding[:, half : 2 * half], embedding[:, :half], embedding[:, 2 * half :]], dim=-1)


def get_timestep_embedding_sdxl(
    timesteps: torch.Tensor,
    embedding_dim: int,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> torch.Tensor:
    """`get_timestep_embedding` of `library.sdxl_original_unet`: cosines always first."""
    return timestep_embedding(timesteps, embedding_dim, downscale_freq_shift, max_period=max_period, scale=scale)
