"""`SdxlNetworkTrainer`: trains a network on an SDXL model; the hooks in which it differs from `NetworkTrainer`."""

from __future__ import annotations

from typing import Any

import torch

from library.data.text_cache import require_fixed_captions
from library.options.sdxl import BUCKET_STEPS, require_frozen_encoders, verify_sdxl_training_args
from library.training.hooked_trainer import HookedSdxlTrainer
from library.training.latents import move_vae
from library.training.network_trainer import NetworkTrainer


class SdxlNetworkTrainer(HookedSdxlTrainer, NetworkTrainer):
    """Trains a network on an SDXL model."""

    script = "sdxl_train_network.py"

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any = None) -> None:
        """Options that SDXL cannot have, captions that change though cached, buckets that its U-Net cannot take."""
        super().assert_extra_args(args, train_dataset_group, val_dataset_group)
        verify_sdxl_training_args(args)
        if self.is_text_encoder_outputs_cached(args):
            require_fixed_captions(getattr(train_dataset_group, "datasets", [train_dataset_group]))
            require_frozen_encoders(True, args.network_train_unet_only)
        train_dataset_group.verify_bucket_reso_steps(BUCKET_STEPS)

    def is_text_encoder_outputs_cached(self, args: Any) -> bool:
        return args.cache_text_encoder_outputs

    def is_text_encoder_not_needed_for_training(self, args: Any) -> bool:
        return self.is_text_encoder_outputs_cached(args)

    def cache_text_encoder_outputs_if_needed(
        self,
        args: Any,
        accelerator: Any,
        unet: Any,
        vae: Any,
        tokenizers: list[Any],
        text_encoders: list[Any],
        dataset: Any,
        weight_dtype: torch.dtype,
    ) -> None:
        """With cached outputs the encoders end on the CPU in float32, else where the steps need them.

        U-Net and VAE make room meanwhile, unless `--lowram` wants them to stay.
        """
        if not self.is_text_encoder_outputs_cached(args):
            super().cache_text_encoder_outputs_if_needed(
                args, accelerator, unet, vae, tokenizers, text_encoders, dataset, weight_dtype
            )
            return
        places = [(module, next(module.parameters()).device) for module in (unet, vae)]
        if not args.lowram:
            for module, _ in places:
                move_vae(module, "cpu")
        for encoder in text_encoders:
            encoder.to(accelerator.device, dtype=weight_dtype)
        dataset.cache_text_encoder_outputs(
            tokenizers,
            text_encoders,
            accelerator.device,
            weight_dtype,
            args.cache_text_encoder_outputs_to_disk,
            accelerator.is_main_process,
        )
        for encoder in text_encoders:
            encoder.to("cpu", dtype=torch.float32)
        for module, device in places:
            move_vae(module, device)

    def get_text_cond(
        self,
        args: Any,
        accelerator: Any,
        batch: Any,
        tokenizers: list[Any],
        text_encoders: list[Any],
        weight_dtype: torch.dtype,
    ) -> Any:
        """(hidden 1, hidden 2, pooled) of a batch: its cached outputs, or encoded now."""
        if batch.get("text_encoder_outputs1_list") is None:
            return super().get_text_cond(args, accelerator, batch, tokenizers, text_encoders, weight_dtype)
        keys = ("text_encoder_outputs1_list", "text_encoder_outputs2_list", "text_encoder_pool2_list")
        return tuple(batch[key].to(accelerator.device, weight_dtype, non_blocking=True) for key in keys)
