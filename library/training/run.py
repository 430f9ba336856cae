"""A training run: everything the loop works on, assembled once (`assemble.py`), and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.runtime.memory import TRAINING_REMEDIES
from library.runtime.parallel import Copies
from library.training.control import ControlFiles
from library.training.ema import MovingAverage, no_average
from library.training.moved import MovedCheck
from library.training.validation import NoValidation

if TYPE_CHECKING:
    import torch

    from library.diffusion.schedule import NoiseSchedule
    from library.options.objective import ObjectiveConfig
    from library.runtime.processes import Processes
    from library.training.draws import Draws
    from library.training.feed import DataFeed
    from library.training.guard import FiniteGuard
    from library.training.latents import LatentEncoder
    from library.training.logbook import LogBook
    from library.training.samples import SamplePictures
    from library.training.saver import Saver
    from library.training.targets.target import Target


@dataclass(slots=True)
class Position:
    """Where a run stands; what a state folder stores and a resume restores.

    Attributes:
        epoch: 1-based number of the epoch that is running or comes next.
        micro: micro-steps done in that epoch on this process.
        step: optimizer updates done since the start of the run.
    """

    epoch: int = 1
    micro: int = 0
    step: int = 0


@dataclass(kw_only=True)
class Run:
    """The parts of a run, each built by its own room.

    Attributes:
        target: what is trained, with family and model.
        feed: epoch plans and their batches.
        objective, v_prediction, noise_schedule: what is learned.
        latents: pictures to latents for batches without cached ones.
        optimizer, lr_schedule: the schedule steps once per update.
        scaler: gradient scaler under fp16, else None.
        accumulation: micro-steps per update; max_grad_norm: 0 for no clipping.
        max_steps, epochs: length of the run, counted from its start (not from a resume).
        parallel: how weights, gradients and optimizer state lie on the processes.
        autocast: a context manager factory for the U-Net call.
        ema: moving average of what is trained; false in an if where there is none.
        validation: loss on held-out pictures.
        control: files that ask the run to save or to stop.
        moved: looks after the first steps whether all parts change.
        memory_remedies: what to switch on when memory runs out.
    """

    target: Target
    feed: DataFeed
    objective: ObjectiveConfig
    v_prediction: bool
    noise_schedule: NoiseSchedule
    draws: Draws
    latents: LatentEncoder
    optimizer: torch.optim.Optimizer
    lr_schedule: Any
    scaler: torch.amp.GradScaler | None
    guard: FiniteGuard
    processes: Processes
    autocast: Any
    accumulation: int
    max_grad_norm: float
    max_steps: int
    epochs: int
    seed: int
    log: LogBook
    saver: Saver
    samples: SamplePictures
    position: Position
    ema: MovingAverage = field(default_factory=no_average)
    validation: NoValidation = field(default_factory=NoValidation)
    control: ControlFiles = field(default_factory=ControlFiles)
    moved: MovedCheck = field(default_factory=MovedCheck)
    memory_remedies: tuple[str, ...] = TRAINING_REMEDIES
    parallel: Copies = field(default_factory=Copies)
