"""The recipe of the network scripts: asks the trainer object, whose hooks third parties override."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from library.data.support import SUPPORT
from library.messages import log
from library.runtime.float8 import hold_in_float8
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training import model_setup, network_setup
from library.training.hooks import Hooks, refuse_strategy_overrides
from library.training.network_record import NetworkRecord
from library.training.recipes.recipe import Recipe, Setup
from library.training.saving import network_extension
from library.training.targets.network import NetworkTarget

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.feed import DataFeed
    from library.training.network_trainer import NetworkTrainer
    from library.training.optimizers import Built
    from library.training.saver import Metadata
    from library.training.targets.target import Target


class NetworkRecipe(Recipe):
    """A network on a frozen model.

    Args:
        trainer: whose hooks are asked.
    """

    tracker = "network_train"
    support = SUPPORT["train_network.py"]
    hooks: Hooks
    spreads = ("--deepspeed",)

    def __init__(self, trainer: NetworkTrainer) -> None:
        refuse_strategy_overrides(trainer)
        super().__init__(trainer)
        self.trainer = trainer
        self.hooks = Hooks(trainer)
        self.script = trainer.script
        self.module: ModuleType | None = None
        self.network_args: dict[str, Any] = {}

    def check_group(self, args: Any, group: Any) -> None:
        self.hooks.assert_extra_args(args, group)

    def check(self, options: Resolved) -> None:
        network = options.network
        self.module = network_setup.import_network_module(network.network_module)
        for path in network.base_weights or ():
            network_setup.require_file(path, "--base_weights")
        if network.network_weights:
            network_setup.require_file(network.network_weights, "--network_weights")

    def after_opening(self, setup: Setup) -> None:
        device = setup.processes.device if setup.options.precision.lowram else "cpu"
        assert self.module is not None
        network_setup.merge_base_weights(self.module, setup.options.network, setup.model, setup.dtype, device)

    def half_vae(self, setup: Setup) -> bool:
        return self.trainer.cast_vae(setup.args)

    def scale_latents(self, args: Any, latents: torch.Tensor) -> torch.Tensor:
        return self.trainer.shift_scale_latents(args, latents)

    def prepare_text(self, setup: Setup) -> None:
        model = setup.model
        self.hooks.cache_text_outputs(
            setup.args,
            setup.processes.accelerator,
            model.unet,
            model.vae,
            setup.tokenizers,
            model.text_encoders,
            setup.group,
            setup.dtype,
        )

    def make_target(self, setup: Setup) -> NetworkTarget:
        """The network on the placed model."""
        trainer, args, model, options = self.trainer, setup.args, setup.model, setup.options
        trains_text = trainer.is_train_text_encoder(args)
        trains_unet = not options.network.network_train_text_encoder_only
        setup.draws.seed_creation()
        assert self.module is not None
        network, self.network_args = network_setup.make_network(self.module, options.network, model)
        if hasattr(network, "prepare_network"):
            network.prepare_network(args)
        max_norm = max_norm_of(network, args)
        self._place_models(setup)
        network_setup.apply_network(network, options.network, model, trains_text=trains_text, trains_unet=trains_unet)
        accelerator = setup.processes.accelerator
        trainer.post_process_network(args, accelerator, network, model.text_encoders, model.unet)
        self._checkpoint_and_compile(setup, network, trains_text)
        return NetworkTarget(
            hooks=self.hooks,
            args=args,
            accelerator=accelerator,
            family=self.family,
            model=model,
            network=network,
            weight_dtype=setup.dtype,
            trains_text=trains_text,
            trains_unet=trains_unet,
            weighted_captions=options.model.weighted_captions,
            max_norm=max_norm,
        )

    def _place_models(self, setup: Setup) -> None:
        """Cast, layout and device of the frozen parts; the network is attached after this and before compiling."""
        trainer, device = self.trainer, setup.processes.device
        unet_dtype = setup.dtype if trainer.cast_unet(setup.args) else None
        wrap_model(setup.model.unet, WrapPolicy(device=device, dtype=unet_dtype), family=self.family.name)
        precision = setup.options.precision
        if precision.fp8_base or precision.fp8_base_unet:
            hold_in_float8(setup.model.unet)
        if trainer.is_text_encoder_not_needed_for_training(setup.args):
            return
        for encoder in setup.model.text_encoders:
            encoder.to(device, setup.dtype if trainer.cast_text_encoder(setup.args) else None)
            if precision.fp8_base:
                hold_in_float8(encoder)

    def _checkpoint_and_compile(self, setup: Setup, network: Any, trains_text: bool) -> None:
        """Gradient checkpointing and regional compile, after the network was attached."""
        model_setup.checkpoint_and_compile(self.family, setup)
        if not setup.options.precision.gradient_checkpointing:
            return
        network.enable_gradient_checkpointing()
        if trains_text:
            from library.models.text_encoders import enable_gradient_checkpointing

            for index, encoder in enumerate(setup.model.text_encoders):
                enable_gradient_checkpointing(encoder)
                encoder.train()
                self.trainer.prepare_text_encoder_grad_ckpt_workaround(index, encoder)

    def before_first_step(self, setup: Setup, target: Target) -> None:
        assert isinstance(target, NetworkTarget)
        network = target.network
        network.to(setup.processes.device)
        if setup.options.precision.halves_trained:
            network.to(setup.dtype)
        network.prepare_grad_etc(network_setup.encoders_argument(setup.model), setup.model.unet)

    def metadata(self, setup: Setup, feed: DataFeed, built: Built, epochs: int) -> Metadata:
        return NetworkRecord(
            trainer=self.trainer,
            args=setup.args,
            options=setup.options,
            feed=feed,
            version=setup.model.version,
            built=built,
            network_args=self.network_args if setup.options.network.network_args else None,
            epochs=epochs,
        )

    def extension(self, setup: Setup) -> str:
        return network_extension(setup.options.saving)


def max_norm_of(network: Any, args: Any) -> float | None:
    """`--scale_weight_norms`, or None where the network cannot; written back for hooks and metadata."""
    if args.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        log.warning("--scale_weight_norms has no effect: this network cannot limit its weight norms")
        args.scale_weight_norms = False
    return args.scale_weight_norms or None
