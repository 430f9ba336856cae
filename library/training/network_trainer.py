"""`NetworkTrainer`: trains a network, and offers the hook methods that third parties override.

Hook names, argument order and results are those of sd-scripts 0.7.0, with the later releases' additional hooks
(see docs/architecture.md for who asks whom in which order). A base method does the whole job of its hook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.training import step
from library.training.classic_text import get_weighted_text_embeddings
from library.training.hooked_trainer import HookedTrainer

if TYPE_CHECKING:
    import argparse


class NetworkTrainer(HookedTrainer):
    """Trains a network on an SD 1.x/2.x model.

    Attributes: see `HookedTrainer`.
    """

    script = "train_network.py"

    def train(self, args: argparse.Namespace) -> None:
        """The whole run; returns early for `--debug_dataset` and `--dry_run`."""
        from library.training.recipes.network import NetworkRecipe
        from library.training.recipes.recipe import train_by

        train_by(NetworkRecipe(self), args)

    # Before the first step, in call order

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any = None) -> None:
        """May raise, may change args, may configure the data set. Nothing to check here."""

    def is_text_encoder_outputs_cached(self, args: Any) -> bool:
        return False

    def is_train_text_encoder(self, args: Any) -> bool:
        return not args.network_train_unet_only and not self.is_text_encoder_outputs_cached(args)

    def get_text_encoders_train_flags(self, args: Any, text_encoders: list[Any]) -> list[bool]:
        return [self.is_train_text_encoder(args)] * len(text_encoders)

    def is_text_encoder_not_needed_for_training(self, args: Any) -> bool:
        """True lets the text encoders leave the device."""
        return False

    def cache_text_encoder_outputs_if_needed(
        self,
        args: Any,
        accelerator: Any,
        unet: Any,
        vae: Any,
        tokenizers: list[Any],
        text_encoders: list[Any],
        data_loader: Any,
        weight_dtype: torch.dtype,
    ) -> None:
        """Leave the encoders where the steps need them."""
        for encoder in text_encoders:
            encoder.to(accelerator.device)

    def cast_vae(self, args: Any) -> bool:
        return not args.no_half_vae

    def cast_unet(self, args: Any) -> bool:
        return True

    def cast_text_encoder(self, args: Any) -> bool:
        """Encoders that are not trained are held in the weight dtype."""
        return not self.is_train_text_encoder(args)

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> None:
        """After the network was applied and its weights loaded."""

    def prepare_unet_with_accelerator(self, args: Any, accelerator: Any, unet: Any) -> Any:
        """The U-Net as the steps call it; networks reduce their own gradients, so no wrapper."""
        return unet

    def prepare_text_encoder_grad_ckpt_workaround(self, index: int, text_encoder: Any) -> None:
        """Non-reentrant checkpointing needs no input with gradients."""

    def update_metadata(self, metadata: dict[str, str], args: Any) -> None:
        """May add keys to the file's metadata."""

    def get_sai_model_spec(self, args: Any) -> dict[str, str]:
        """ModelSpec entries of the network file."""
        from library.training.data_metadata import common_resolution
        from library.training.metadata import modelspec_for_network

        datasets = self.run.feed.group.datasets if self.run else []
        return modelspec_for_network(args, is_sdxl=self.is_sdxl, resolution=common_resolution(datasets))

    def get_noise_scheduler(self, args: Any, device: Any) -> Any:
        """The noise schedule of the run."""
        return self.run.noise_schedule if self.run else None

    # Each micro-step, in call order

    def on_step_start(
        self,
        args: Any,
        accelerator: Any,
        network: Any,
        text_encoders: Any,
        unet: Any,
        batch: Any,
        weight_dtype: Any,
        is_train: bool = True,
    ) -> None:
        """A micro-step begins."""

    def encode_images_to_latents(self, args: Any, vae: Any, images: torch.Tensor) -> torch.Tensor:
        """VAE latents of pictures (B, 3, H, W), not yet scaled."""
        from library.training.latents import encode

        assert self.run is not None and self.place is not None
        return self.run.draws.posterior(self.place, encode(vae, images, vae.dtype))

    def shift_scale_latents(self, args: Any, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.vae_scale_factor

    def get_text_cond(
        self,
        args: Any,
        accelerator: Any,
        batch: Any,
        tokenizers: list[Any],
        text_encoders: list[Any],
        weight_dtype: torch.dtype,
    ) -> Any:
        """Encoded text of a batch: hidden states, or (hidden 1, hidden 2, pooled) where the family has them."""
        keys = ("input_ids", "input_ids2")[: len(text_encoders)]
        text = self.family.encode_text(
            text_encoders,
            [batch[key].to(accelerator.device, non_blocking=True) for key in keys],
            tokenizers=tokenizers,
            clip_skip=args.clip_skip,
            max_token_length=args.max_token_length,
            dtype=weight_dtype,
        )
        return text.hidden[0] if text.pooled is None else (*text.hidden, text.pooled)

    def get_noise_pred_and_target(
        self,
        args: Any,
        accelerator: Any,
        noise_scheduler: Any,
        latents: torch.Tensor,
        batch: Any,
        text_encoder_conds: Any,
        unet: Any,
        network: Any,
        weight_dtype: torch.dtype,
        train_unet: bool,
        is_train: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(prediction, target, timesteps, extra weights per sample or None)."""
        assert self.run is not None and self.place is not None
        return *step.predict_and_target(self.run, latents, text_encoder_conds, batch, self.place), None

    def post_process_loss(self, loss: torch.Tensor, args: Any, timesteps: torch.Tensor, noise_scheduler: Any) -> Any:
        """A last word on the per-sample losses (B,)."""
        return loss

    def process_batch(self, batch: Any, *_: Any, **__: Any) -> torch.Tensor:
        """The batch's loss, a scalar."""
        assert self.run is not None and self.place is not None
        return step.objective_loss(self.run, batch, self.place)[0]

    def all_reduce_network(self, accelerator: Any, network: Any) -> None:
        """Average the network's gradients over processes."""
        assert self.run is not None
        self.run.processes.all_reduce_gradients(self.run.target.trainable_parameters())

    def sample_images(
        self,
        accelerator: Any,
        args: Any,
        epoch: int | None,
        global_step: int,
        device: Any,
        vae: Any,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
    ) -> None:
        """Draw the sample pictures if this step or epoch is one for them."""
        assert self.run is not None
        self.run.samples.draw_if_due(self.run, epoch, global_step)

    def generate_step_logs(
        self,
        args: Any,
        current_loss: float,
        avr_loss: float,
        lr_scheduler: Any,
        lr_descriptions: Any = None,
        keys_scaled: Any = None,
        mean_norm: Any = None,
        maximum_norm: Any = None,
        **later: Any,
    ) -> dict[str, float]:
        """What a micro-step logs. The fifth positional argument is `keys_scaled` in 0.7.0."""
        from library.training.logbook import step_logs

        if isinstance(lr_descriptions, (int, float)):
            keys_scaled, mean_norm, maximum_norm = lr_descriptions, keys_scaled, mean_norm
            lr_descriptions = None
        return step_logs(
            current_loss,
            avr_loss,
            lr_scheduler.get_last_lr(),
            lr_descriptions or (self.run.log.group_names if self.run else None),
            optimizer=getattr(lr_scheduler, "optimizer", None),
            keys_scaled=keys_scaled,
            mean_norm=mean_norm,
            maximum_norm=maximum_norm,
        )

    def step_logging(self, accelerator: Any, logs: dict[str, float], global_step: int, epoch: int) -> None:
        accelerator.log(logs, step=global_step)

    def epoch_logging(self, accelerator: Any, logs: dict[str, float], global_step: int, epoch: int) -> None:
        accelerator.log(logs, step=epoch)

    def on_validation_step_end(self, *_: Any) -> None:
        """After each validation batch."""

    def weighted_text_cond(self, captions: list[str], weight_dtype: torch.dtype) -> Any:
        """Encoded captions with emphasis marks (`--weighted_captions`); families with one text encoder only."""
        assert self.run is not None
        model = self.run.target.model
        options = self.run.target.args  # type: ignore[attr-defined]
        return get_weighted_text_embeddings(
            model.tokenizers[0],
            model.text_encoders[0],
            captions,
            self.run.processes.device,
            max_embeddings_multiples=(options.max_token_length or 75) // 75,
            clip_skip=options.clip_skip,
        ).to(weight_dtype)
