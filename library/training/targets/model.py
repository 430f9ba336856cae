"""Target: the model itself, U-Net and (when wanted) text encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError, log
from library.models.family import TextCondition
from library.models.tokenizers import without_padding
from library.runtime.parallel import Copies
from library.training.classic_text import get_weighted_text_embeddings
from library.training.kept_weights import KeptWeights
from library.training.model_parts import Rates, freeze_parts, trained_modules, trained_parts
from library.training.saving import ModelFormat
from library.training.targets.target import Target, non_finite

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.models.family import Family, LoadedModel
    from library.training.draws import Place
    from library.training.run import Run

_CACHED = ("text_encoder_outputs1_list", "text_encoder_outputs2_list", "text_encoder_pool2_list")


class ModelTarget(Target):
    """Weights of the U-Net and of the text encoders, each part at its rate.

    Args:
        family, model: what is trained, on the training device, in the training dtype.
        rates: of the parts.
        clip_skip, max_token_length: as for `Family.encode_text`.
        written_as: form of the files that are written.
        text_steps: updates after which the text encoders stay as they are; None for never.
        weighted_captions: emphasis marks in captions count.
        short_captions: captions are not padded beyond the longest of their batch.
        autocast: a context manager factory for the text encoders that learn.
        input_dtype: of the latents that the U-Net is given, and of cached text; None leaves them.
        kept: what halving took from the parts that do not learn; it is written.
        parallel: how the weights lie on the processes.
    """

    def __init__(
        self,
        *,
        family: Family,
        model: LoadedModel,
        rates: Rates,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        written_as: ModelFormat | None = None,
        text_steps: int | None = None,
        weighted_captions: bool = False,
        short_captions: bool = False,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        input_dtype: torch.dtype | None = None,
        kept: KeptWeights | None = None,
        parallel: Copies | None = None,
    ) -> None:
        self.family = family
        self.model = model
        self.rates = rates
        self.clip_skip = clip_skip
        self.max_token_length = max_token_length
        self.written_as = written_as or ModelFormat()
        self.text_steps = text_steps
        self.weighted_captions = weighted_captions
        self.short_captions = short_captions
        self.autocast = autocast
        self.input_dtype = input_dtype
        self.kept = kept or KeptWeights()
        self.parallel = parallel or Copies()
        self.trains_text = rates.trains_text
        freeze_parts(model.unet, model.text_encoders, rates, family.idle_parameters(model.text_encoders, clip_skip))
        self.parts = trained_parts(model.unet, model.text_encoders, rates)
        self._parameters = [parameter for part in self.parts for parameter in part.parameters]
        self.on_epoch_start(1)

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Names (prefixes in a state) and modules, U-Net first; whether they still learn or have stopped."""
        return trained_modules(self.model, self.rates)

    def parameter_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        groups = [{"params": list(part.parameters), "lr": part.rate} for part in self.parts]
        return groups, [part.name for part in self.parts]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return self._parameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, module in self.trained_modules().items()
            for key, tensor in self.parallel.module_state(module).items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, module in self.trained_modules().items():
            prefix = f"{name}."
            own = {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}
            self.parallel.load_module(module, own)

    def load_prepared(self, states: list[dict[str, torch.Tensor]]) -> None:
        """U-Net and trained text encoders, in this order."""
        modules = self.trained_modules()
        for (name, module), state in zip(modules.items(), states, strict=True):
            own = module.state_dict()
            module.load_state_dict({k: t for k, t in state.items() if k in own or not k.endswith(".position_ids")})
            log.info("%s taken from the state", name)

    def on_epoch_start(self, epoch: int) -> None:
        for module in self.trained_modules().values():
            module.train()

    def compute_loss(self, run: Run, batch: Batch, place: Place) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._stop_text_if_due(run.position.step)
        return super().compute_loss(run, batch, place)

    def _stop_text_if_due(self, step: int) -> None:
        """From here on the text encoders stay as they are; without gradients the optimizer leaves them alone."""
        if not self.trains_text or self.text_steps is None or step < self.text_steps:
            return
        log.info("step %d: the text encoder stops training", step)
        self.trains_text = False
        for encoder in self.model.text_encoders:
            encoder.requires_grad_(False).eval()
        self._parameters = [parameter for parameter in self._parameters if parameter.requires_grad]

    def written_tensors(self) -> Iterable[torch.Tensor]:
        modules = (self.model.unet, *self.model.text_encoders, self.model.vae)
        return [parameter for module in modules for parameter in module.parameters()]

    def encode_text(self, batch: Batch) -> TextCondition:
        cached = self._cached_text(batch)
        if cached is not None:
            return cached
        model = self.model
        with (
            torch.set_grad_enabled(self.trains_text and not self.validating),
            self.autocast() if self.trains_text else contextlib.nullcontext(),
        ):
            if self.weighted_captions:
                return TextCondition([self._weighted(batch["captions"])])
            return self.family.encode_text(
                model.text_encoders,
                self._input_ids(batch),
                tokenizers=model.tokenizers,
                clip_skip=self.clip_skip,
                max_token_length=self.max_token_length,
            )

    def _cached_text(self, batch: Batch) -> TextCondition | None:
        first, second, pooled = (batch.get(key) for key in _CACHED)
        if first is None:
            return None
        device, dtype = self._device(), self.input_dtype
        hidden = [states.to(device, dtype, non_blocking=True) for states in (first, second) if states is not None]
        return TextCondition(hidden, None if pooled is None else pooled.to(device, dtype, non_blocking=True))

    def _weighted(self, captions: list[str]) -> torch.Tensor:
        return get_weighted_text_embeddings(
            self.model.tokenizers[0],
            self.model.text_encoders[0],
            captions,
            self._device(),
            max_embeddings_multiples=(self.max_token_length or 75) // 75,
            clip_skip=self.clip_skip,
        )

    def _input_ids(self, batch: Batch) -> list[torch.Tensor]:
        ids = [batch[key] for key in ("input_ids", "input_ids2")[: len(self.model.text_encoders)]]
        if self.short_captions:
            ids = [without_padding(rows, t.eos_token_id) for rows, t in zip(ids, self.model.tokenizers, strict=True)]
        return [rows.to(self._device(), non_blocking=True) for rows in ids]

    def _device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: TextCondition, batch: Batch
    ) -> torch.Tensor:
        return self.family.predict(self.model.unet, noisy_latents.to(self.input_dtype), timesteps, text, batch)

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        """Write the model; refused when a weight is not finite."""
        model = self._whole_model()
        if model is None:
            return
        written = trained_modules(model, self.rates).items()
        bad = non_finite({f"{name}.{key}": t for name, module in written for key, t in module.state_dict().items()})
        if bad:
            raise UserError(
                f"{path.name} is not written: {len(bad)} weights are not finite numbers, the first is {bad[0]}",
                "lower the learning rate or use --mixed_precision bf16; earlier files are intact",
            )
        with self.kept.restored():
            self.family.save(
                model,
                path,
                stability_layout=self.written_as.stability_layout,
                safetensors=self.written_as.safetensors,
                dtype=dtype,
                metadata=metadata or None,
                epoch=epoch,
                step=step,
            )

    def _whole_model(self) -> LoadedModel | None:
        """The model with whole weights; None on processes that do not write it."""
        learned = self.trained_modules()
        whole = {name: self.parallel.whole_module(name, module) for name, module in learned.items()}
        if None in whole.values():
            return None
        by_module = {id(learned[name]): module for name, module in whole.items()}
        return replace(
            self.model,
            unet=by_module.get(id(self.model.unet), self.model.unet),
            text_encoders=[by_module.get(id(encoder), encoder) for encoder in self.model.text_encoders],
        )
