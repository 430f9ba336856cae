"""XTI's functions that others assign to the U-Net's classes; the classes themselves route by layer today.

They keep the classes' own forward functions from before such an assignment, so they can stand in for them.
"""

from __future__ import annotations

from typing import Any

import torch

from library.models.layers import SampleOutput
from library.models.unet_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D
from library.models.unet_sd import UNet2DConditionModel

_unet_forward = UNet2DConditionModel.forward
_down_forward = CrossAttnDownBlock2D.forward
_up_forward = CrossAttnUpBlock2D.forward


def unet_forward_XTI(
    self: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    encoder_hidden_states: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    return_dict: bool = True,
) -> SampleOutput | tuple[torch.Tensor]:
    """The U-Net for text states (16, B, L, D), one for each cross-attention in forward order."""
    return _unet_forward(self, sample, timestep, encoder_hidden_states, class_labels, return_dict)


def downblock_forward_XTI(
    self: CrossAttnDownBlock2D,
    hidden_states: torch.Tensor,
    temb: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: Any = None,
    cross_attention_kwargs: Any = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A level of the down path for text states (attentions, B, L, D); the last two arguments have no effect."""
    return _down_forward(self, hidden_states, temb, encoder_hidden_states)


def upblock_forward_XTI(
    self: CrossAttnUpBlock2D,
    hidden_states: torch.Tensor,
    res_hidden_states_tuple: tuple[torch.Tensor, ...],
    temb: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    upsample_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A level of the up path for text states (attentions, B, L, D)."""
    return _up_forward(self, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, upsample_size)
