"""Target: a network (LoRA and its relatives) on a frozen model, driven through the trainer object's hooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError, log
from library.runtime.files import atomic_path
from library.training.step import per_sample_loss
from library.training.targets.target import Target, non_finite

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.models.family import Family, LoadedModel
    from library.runtime.processes import Processes
    from library.training.draws import Place
    from library.training.hooks import Hooks
    from library.training.run import Run

# Key of a subset's `custom_attributes`.
PRESERVED = "diff_output_preservation"


class NetworkTarget(Target):
    """A network module's object, called as networks.md 1.2 says.

    Args:
        hooks: of the trainer object.
        args: the caller's namespace, which hooks read live.
        accelerator: as hooks expect it.
        network: the module's network, already applied to the model.
        weight_dtype: of the frozen model.
        trains_text, trains_unet: which parts the network changes.
        max_norm: `--scale_weight_norms`, or None.
    """

    def __init__(
        self,
        *,
        hooks: Hooks,
        args: Any,
        accelerator: Any,
        family: Family,
        model: LoadedModel,
        network: Any,
        weight_dtype: torch.dtype,
        trains_text: bool,
        trains_unet: bool,
        weighted_captions: bool,
        max_norm: float | None,
    ) -> None:
        self.hooks = hooks
        self.args = args
        self.accelerator = accelerator
        self.family = family
        self.model = model
        self.network = network
        self.weight_dtype = weight_dtype
        self.trains_text = trains_text
        self.trains_unet = trains_unet
        self.weighted_captions = weighted_captions
        self.max_norm = max_norm
        self.multiplier = 1.0
        self.step_hook = getattr(network, "on_step_start", None)

    def parameter_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Groups of the network module; both return forms and the two-argument form are taken."""
        prepare, text_rate = self._prepare_function()
        rates = (text_rate, self.args.unet_lr)
        try:
            result = prepare(*rates, self.args.learning_rate)
        except TypeError:
            result = prepare(*rates)
        groups, names = result if isinstance(result, tuple) else (result, None)
        groups = [{**group, "params": list(group["params"])} for group in groups]
        return groups, list(names) if names else self._default_names(len(groups))

    def _prepare_function(self) -> tuple[Any, Any]:
        """The network's function that makes groups, and what it takes as the text encoders' rate."""
        rate = self.args.text_encoder_lr
        if not isinstance(rate, (list, tuple)):
            return self.network.prepare_optimizer_params, rate
        if len(rate) != len(self.model.text_encoders):
            raise UserError(
                f"--text_encoder_lr has {len(rate)} values, but the model has {len(self.model.text_encoders)} "
                f"text encoder{'s' * (len(self.model.text_encoders) > 1)}",
                "give one value for all, or one for each",
            )
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            return several, list(rate)
        log.warning("this network takes one rate for all text encoders: the first of --text_encoder_lr, %g", rate[0])
        return self.network.prepare_optimizer_params, rate[0]

    def _default_names(self, count: int) -> list[str]:
        parts = ["textencoder"] * self.trains_text + ["unet"] * self.trains_unet
        return parts if count == len(parts) else [f"group{i}" for i in range(count)]

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        return {"network": self.network}

    def extra_modules(self) -> list[torch.nn.Module]:
        return [self.network]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.network.get_trainable_params())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.network.load_state_dict(state)

    def on_epoch_start(self, epoch: int) -> None:
        self.network.on_epoch_start(self.model.text_encoders[0], self.model.unet)

    def on_step_start(self, batch: Batch) -> None:
        self._use_multiplier(batch)
        if self.hooks.overridden("on_step_start"):
            self.hooks.call(
                "on_step_start",
                self.args,
                self.accelerator,
                self.network,
                self.model.text_encoders,
                self.model.unet,
                batch,
                self.weight_dtype,
                **self._is_train("on_step_start"),
            )
        if self.step_hook is not None and not self.validating:
            self.step_hook(self.model.text_encoders[0], self.model.unet)

    def _use_multiplier(self, batch: Batch) -> None:
        """The strength that the batch's data set asks of the network (`network_multiplier`)."""
        values = batch.get("network_multipliers")
        wanted = set(values.tolist()) if isinstance(values, torch.Tensor) else {1.0}  # on the CPU: no device read
        if len(wanted) > 1:
            raise UserError("a batch mixes network multipliers", "give batches of one multiplier each")
        self._set_multiplier(wanted.pop() if wanted else 1.0)

    def _set_multiplier(self, value: float) -> None:
        if value == self.multiplier:
            return
        if not hasattr(self.network, "set_multiplier"):
            raise UserError("network_multiplier: this network has no strength to set", "leave the key out")
        self.network.set_multiplier(value)
        self.multiplier = value

    def encode_text(self, batch: Batch) -> Any:
        with torch.set_grad_enabled(self.trains_text and not self.validating):
            if self.weighted_captions:
                return self.hooks.trainer.weighted_text_cond(batch["captions"], self.weight_dtype)
            return self.hooks.call(
                "get_text_cond",
                self.args,
                self.accelerator,
                batch,
                self.model.tokenizers,
                self.model.text_encoders,
                self.weight_dtype,
            )

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: Batch) -> torch.Tensor:
        return self.hooks.call(
            "call_unet",
            self.args,
            self.accelerator,
            self.model.unet,
            noisy_latents,
            timesteps,
            text,
            batch,
            self.weight_dtype,
        )

    def preserved(
        self, wanted: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: Batch
    ) -> torch.Tensor:
        """Pictures marked `diff_output_preservation` should be predicted as the model does without the network."""
        marks = [bool(one.get(PRESERVED)) for one in batch.get("custom_attributes") or ()]
        if not any(marks):
            return wanted
        if not hasattr(self.network, "set_multiplier"):
            raise UserError(f"{PRESERVED}: this network cannot be switched off for a while", "leave the attribute out")
        strength = self.multiplier
        self._set_multiplier(0.0)
        try:
            with torch.no_grad():
                plain = self.predict(noisy_latents, timesteps, text, batch)
        finally:
            self._set_multiplier(strength)
        chosen = torch.tensor(marks).to(wanted.device, non_blocking=True)
        return torch.where(chosen[:, None, None, None], plain.to(wanted.dtype), wanted)

    def compute_loss(self, run: Run, batch: Batch, place: Place) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The objective, or what a subclass puts in its place (`process_batch`, `get_noise_pred_and_target`)."""
        self.hooks.trainer.place = place
        if self.hooks.overridden("process_batch"):
            return self.hooks.trainer.process_batch(*self._process_batch_arguments(run, batch)), None
        if self.hooks.overridden("get_noise_pred_and_target"):
            latents = run.latents(batch, place)
            prediction, wanted, timesteps, weighting = self.hooks.trainer.get_noise_pred_and_target(
                self.args,
                self.accelerator,
                run.noise_schedule,
                latents,
                batch,
                self.encode_text(batch),
                self.model.unet,
                self.network,
                self.weight_dtype,
                self.trains_unet,
                **self._is_train("get_noise_pred_and_target"),
            )
            losses = per_sample_loss(run, prediction, wanted, timesteps, batch)
            losses = losses if weighting is None else losses * weighting
            losses = self.post_process_loss(losses, timesteps)
            run.log.note_samples(losses, timesteps)
            return losses.mean(), timesteps
        return super().compute_loss(run, batch, place)

    def _is_train(self, hook: str) -> dict[str, bool]:
        """The hook's argument `is_train` of v0.10, where it matters and the hook has it."""
        return {"is_train": False} if self.validating and "is_train" in self.hooks.names(hook) else {}

    def on_validation_batch_end(self, batch: Batch) -> None:
        if self.hooks.overridden("on_validation_step_end"):
            model = self.model
            self.hooks.call(
                "on_validation_step_end",
                self.args,
                self.accelerator,
                self.network,
                model.text_encoders,
                model.unet,
                batch,
                self.weight_dtype,
            )
        self._set_multiplier(1.0)

    def _process_batch_arguments(self, run: Run, batch: Batch) -> tuple[Any, ...]:
        return (
            batch,
            self.model.text_encoders,
            self.model.unet,
            self.network,
            self.model.vae,
            run.noise_schedule,
            self.model.vae.dtype,
            self.weight_dtype,
            self.accelerator,
            self.args,
            None,  # text encoding strategy of v0.10
            None,  # tokenize strategy of v0.10
            not self.validating,
            self.trains_text,
            self.trains_unet,
        )

    def post_process_loss(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if not self.hooks.overridden("post_process_loss"):
            return losses
        return self.hooks.call(
            "post_process_loss", losses, self.args, timesteps, self.hooks.trainer.get_noise_scheduler(self.args, None)
        )

    def reduce_gradients(self, processes: Processes) -> None:
        if self.hooks.overridden("all_reduce_network"):
            self.hooks.call("all_reduce_network", self.accelerator, self.network)
        else:
            super().reduce_gradients(processes)

    def on_step_end(self) -> dict[str, Any]:
        """Weight-norm cap, after every micro-step; samples and files see the network at full strength."""
        self._set_multiplier(1.0)
        if not self.max_norm:
            return {}
        scaled, mean, largest = self.network.apply_max_norm_regularization(self.max_norm, self.accelerator.device)
        return {"keys_scaled": scaled, "mean_norm": mean, "maximum_norm": largest}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        """Write the network file; refused when a weight is not finite."""
        bad = non_finite(self.network.state_dict())
        if bad:
            raise UserError(
                f"{path.name} is not written: {len(bad)} weights are not finite numbers, the first is {bad[0]}",
                "lower the learning rate or use --mixed_precision bf16; earlier files are intact",
            )
        with atomic_path(path) as partial:  # foreign networks neither make the folder nor write atomically
            self.network.save_weights(str(partial), dtype, metadata)
