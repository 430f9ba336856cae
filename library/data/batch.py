"""What the loader hands to a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class Batch(TypedDict, total=False):
    """One micro-batch: B pictures of one bucket. Key names are those that third-party hooks read.

    Attributes:
        loss_weights: float32 (B); `prior_loss_weight` for regularisation pictures, else 1.
        input_ids: int64 (B, n, 77), n = 1, 2, 3 chunks; None when text outputs are cached.
        input_ids2: the same for the family's second tokenizer, else None.
        text_encoder_outputs1_list, text_encoder_outputs2_list, text_encoder_pool2_list: cached text, or None.
        images: float32 (B, 3, H, W) in [-1, 1], or None when latents are given.
        latents: float32 (B, 4, H/8, W/8), not yet multiplied by the family's latent scale, or None.
        captions: B processed captions.
        original_sizes_hw, crop_top_lefts, target_sizes_hw: int64 (B, 2).
        flippeds: B booleans.
        image_keys: B keys (normally the absolute path) that name the pictures in messages.
        alpha_masks: float32 (B, H, W) in [0, 1], or None.
        conditioning_images: float32 (B, 3, H, W), ControlNet and masks only.
        network_multipliers: float32 (B).
        custom_attributes: B dicts.
    """

    loss_weights: torch.Tensor
    input_ids: torch.Tensor | None
    input_ids2: torch.Tensor | None
    text_encoder_outputs1_list: torch.Tensor | None
    text_encoder_outputs2_list: torch.Tensor | None
    text_encoder_pool2_list: torch.Tensor | None
    images: torch.Tensor | None
    latents: torch.Tensor | None
    captions: list[str]
    original_sizes_hw: torch.Tensor
    crop_top_lefts: torch.Tensor
    target_sizes_hw: torch.Tensor
    flippeds: list[bool]
    image_keys: list[str]
    alpha_masks: torch.Tensor | None
    conditioning_images: torch.Tensor | None
    network_multipliers: torch.Tensor
    custom_attributes: list[dict]
