"""Learning rates of a network by part of the model, as LoRA and DyLoRA have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from networks.adapter import AdapterNetwork
from networks.optimizer_groups import Part


class PartRates(AdapterNetwork):
    """Mixin of a network: a rate for each text encoder and for the U-Net, and LoRA+ ratios."""

    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    def set_loraplus_lr_ratio(
        self,
        loraplus_lr_ratio: float | None,
        loraplus_unet_lr_ratio: float | None,
        loraplus_text_encoder_lr_ratio: float | None,
    ) -> None:
        """LoRA+: factor of the rate of the up matrices, in general and by part."""
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.loraplus_unet_lr_ratio = loraplus_unet_lr_ratio
        self.loraplus_text_encoder_lr_ratio = loraplus_text_encoder_lr_ratio

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their descriptions.

        Args:
            text_encoder_lr, unet_lr: None = the optimizer's own rate; 0 = the part is not trained.
            default_lr: what block weights and LoRA+ multiply where a part has no rate of its own.
        """
        parts = []
        if self.text_encoder_loras:
            ratio = self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio
            parts.append(Part("textencoder", self.text_encoder_loras, text_encoder_lr, ratio, default_lr))
        if self.unet_loras:
            parts += self._unet_parts(unet_lr, default_lr)
        return self.optimizer_groups(parts)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """`prepare_optimizer_params` with a rate for each text encoder, in the model's order."""
        if not text_encoder_lr or not self.text_encoder_loras:
            return self.prepare_optimizer_params(None, unet_lr, default_lr)
        if len(text_encoder_lr) == 1:
            return self.prepare_optimizer_params(text_encoder_lr[0], unet_lr, default_lr)
        ratio = self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio
        prefixes = self.text_encoder_prefixes(text_encoder_lr)
        parts = [
            Part(
                f"textencoder {number}",
                [lora for lora in self.text_encoder_loras if lora.lora_name.startswith(f"{prefix}_")],
                rate,
                ratio,
                default_lr,
            )
            for number, (prefix, rate) in enumerate(zip(prefixes, text_encoder_lr, strict=True), 1)
        ]
        return self.optimizer_groups(parts + (self._unet_parts(unet_lr, default_lr) if self.unet_loras else []))

    def _unet_parts(self, unet_lr: float | None, default_lr: float | None) -> list[Part]:
        ratio = self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio
        return [Part("unet", self.unet_loras, unet_lr, ratio, default_lr)]
