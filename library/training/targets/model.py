"""Target: the model itself, U-Net and (when wanted) text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.training.targets.target import Target

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.models.family import Family, LoadedModel, TextCondition


class ModelTarget(Target):
    """Every weight of the U-Net, and of the text encoders when `text_rate` is not 0.

    Args:
        family, model: what is trained, on the training device, in the training dtype.
        rate: learning rate of the U-Net, 0 freezes it.
        text_rate: learning rate of the text encoders, 0 freezes them.
        clip_skip, max_token_length: as for `Family.encode_text`.
        stability_layout: of the files that are written.
    """

    def __init__(
        self,
        *,
        family: Family,
        model: LoadedModel,
        rate: float,
        text_rate: float,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        stability_layout: bool = True,
    ) -> None:
        self.family = family
        self.model = model
        self.rate = rate
        self.text_rate = text_rate
        self.clip_skip = clip_skip
        self.max_token_length = max_token_length
        self.stability_layout = stability_layout
        self.trains_text = text_rate != 0
        model.unet.requires_grad_(rate != 0).train()
        for encoder in model.text_encoders:
            encoder.requires_grad_(self.trains_text).train(self.trains_text)

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Names (prefixes in a state) and modules, U-Net first."""
        modules: dict[str, torch.nn.Module] = {"unet": self.model.unet} if self.rate else {}
        if self.trains_text:
            names = ("text_encoder", "text_encoder_2")
            modules |= dict(zip(names, self.model.text_encoders, strict=False))
        return modules

    def parameter_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        rates = {"unet": self.rate}
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rates.get(name, self.text_rate)}
            for name, module in self.trained_modules().items()
        ]
        return groups, list(self.trained_modules())

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [p for module in self.trained_modules().values() for p in module.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": t for name, m in self.trained_modules().items() for key, t in m.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, module in self.trained_modules().items():
            prefix = f"{name}."
            module.load_state_dict({k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)})

    def encode_text(self, batch: Batch) -> TextCondition:
        device = next(self.model.unet.parameters()).device
        ids = [batch[key].to(device, non_blocking=True) for key in ("input_ids", "input_ids2")[: self._encoders()]]
        with torch.set_grad_enabled(self.trains_text):
            return self.family.encode_text(
                self.model.text_encoders,
                ids,
                tokenizers=self.model.tokenizers,
                clip_skip=self.clip_skip,
                max_token_length=self.max_token_length,
            )

    def _encoders(self) -> int:
        return len(self.model.text_encoders)

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: TextCondition, batch: Batch
    ) -> torch.Tensor:
        return self.family.predict(self.model.unet, noisy_latents, timesteps, text, batch)

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        self.family.save(
            self.model,
            path,
            stability_layout=self.stability_layout,
            dtype=dtype,
            metadata=metadata,
            epoch=epoch,
            step=step,
        )
