"""The network (LoRA and its relatives) that is trained."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The network (LoRA and its relatives) that is trained."""

    network_module: str | None = option(None, "module that makes the network, e.g. networks.lora or lycoris.kohya")
    network_weights: str | None = option(None, "network file to start from")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    network_dim: int | None = option(None, "rank of the network; the module's own default when left out")
    network_alpha: float = option(1, "alpha: the network's output is scaled by alpha / rank")
    network_dropout: float | None = option(
        None, "probability from 0 to 1 that a hidden value of the network is dropped"
    )
    network_args: list[str] | None = option(
        None, "arguments of the network module as KEY=VALUE, e.g. conv_dim=4 conv_alpha=1"
    )
    network_train_unet_only: bool = option(False, "train the network's U-Net part only")
    network_train_text_encoder_only: bool = option(False, "train the network's text encoder part only")
    unet_lr: float | None = option(None, "learning rate of the U-Net part; --learning_rate when left out")
    text_encoder_lr: list[float] | float | None = option(
        None, "learning rate of the text encoder part, or one for each text encoder; --learning_rate when left out"
    )
    scale_weight_norms: float | None = option(
        None, "scale a module's weights down where their norm exceeds this (1 is usual; 0 = off)"
    )
    base_weights: list[str] | None = option(None, "network files that are merged into the model before training")
    base_weights_multiplier: list[float] | None = option(
        None, "multipliers of --base_weights; 1.0 where the list is shorter"
    )
    training_comment: str | None = option(None, "text stored in the metadata of the network file")
    no_metadata: bool = option(False, "store only the metadata that is needed to load the network file")
