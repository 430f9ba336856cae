"""The network (LoRA and its relatives) that is trained."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The network (LoRA and its relatives) that is trained."""

    network_module: str | None = option(None, "")
    network_weights: str | None = option(None, "")
    dim_from_weights: bool = option(False, "")
    network_dim: int | None = option(None, "")
    network_alpha: float = option(1, "")
    network_dropout: float | None = option(None, "")
    network_args: list[str] | None = option(None, "")
    network_train_unet_only: bool = option(False, "")
    network_train_text_encoder_only: bool = option(False, "")
    unet_lr: float | None = option(None, "")
    text_encoder_lr: float | None = option(None, "")
    scale_weight_norms: float | None = option(None, "")
    base_weights: list[str] | None = option(None, "")
    base_weights_multiplier: list[float] | None = option(None, "")
    training_comment: str | None = option(None, "")
    no_metadata: bool = option(False, "")
