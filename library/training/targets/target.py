"""What a target (network, whole model, embedding, ...) does for the training loop.

The loop asks the target; the base target asks the family; the network target asks the trainer object, whose
default asks the family (so that third-party hooks are called, see docs/architecture.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from library.training.step import objective_loss

if TYPE_CHECKING:
    from pathlib import Path

    from library.data.batch import Batch
    from library.generation.embeddings import Words
    from library.models.family import Family, LoadedModel
    from library.runtime.processes import Processes
    from library.training.draws import Place
    from library.training.run import Run


class Target(ABC):
    """What is trained.

    Attributes:
        family: the model family.
        model: the opened base model.
        trains_text: text is encoded with gradients.
        words: words that prompts of sample pictures may name (embeddings).
        validating: what is asked now is a validation pass, no training step.
    """

    family: Family
    model: LoadedModel
    trains_text: bool
    words: Words | None = None
    validating: bool = False

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Names and modules that hold what is trained, where a way of spreading weights must know them."""
        return {}

    @abstractmethod
    def parameter_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups (`params`, `lr`) and one name per group for the logs."""

    @abstractmethod
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """What gradients are clipped and reduced over."""

    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        """What a moving average is kept of."""
        return self.trainable_parameters()

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that training changes; what a state folder holds."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore `state_dict()` exactly."""

    @abstractmethod
    def encode_text(self, batch: Batch) -> Any:
        """Text of the batch as `predict` wants it."""

    @abstractmethod
    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: Batch) -> torch.Tensor:
        """U-Net output for noisy latents (B, 4, h, w)."""

    @abstractmethod
    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        """Write the trained thing as the file format of its kind."""

    def written_tensors(self) -> Iterable[torch.Tensor]:
        """What `save` writes, for its size."""
        return self.state_dict().values()

    def compute_loss(self, run: Run, batch: Batch, place: Place) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean loss of a micro-batch, with gradients, and its timesteps."""
        return objective_loss(run, batch, place)

    def preserved(
        self, wanted: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: Batch
    ) -> torch.Tensor:
        """What should be predicted (B, 4, h, w), where the data ask for something else than noise or velocity."""
        return wanted

    def post_process_loss(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A last word on the per-sample losses (B,)."""
        return losses

    def reduce_gradients(self, processes: Processes) -> None:
        """Average gradients over processes; the models carry no wrapper of their own."""
        processes.all_reduce_gradients(self.trainable_parameters())

    def extra_modules(self) -> list[torch.nn.Module]:
        """Modules outside the model that take part in drawing sample pictures."""
        return []

    def load_prepared(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Restore from a state folder of sd-scripts: one state for each module that it prepared, in its order."""
        self.load_state_dict(states[-1])

    def prepared_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state in such a folder, as this program's optimizer takes it."""
        return state

    def on_epoch_start(self, epoch: int) -> None:
        """Epoch (1-based) begins."""

    def on_step_start(self, batch: Batch) -> None:
        """A micro-step begins, inside accumulation, before anything else."""

    def on_validation_batch_end(self, batch: Batch) -> None:
        """A batch of held-out pictures was looked at."""

    def on_step_end(self) -> dict[str, Any]:
        """After every micro-step (weight-norm cap); values to log, tensors allowed."""
        return {}


def non_finite(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors with a NaN or infinity; one host read when there are none."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    if not floating:
        return []
    flags = torch.stack([torch.isfinite(tensor).all() for tensor in floating.values()]).tolist()
    return [name for name, finite in zip(floating, flags, strict=True) if not finite]
