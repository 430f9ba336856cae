"""The loss on held-out pictures, with the same noise and timesteps in every pass, so that passes can be compared.

A pass asks the target as a training step does (third-party hooks included), without gradients and with every module
in evaluation mode; the training's own draws stay as they are.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion.timesteps import validation_timesteps
from library.messages import log
from library.runtime.modes import evaluation_mode
from library.training.draws import Draws, Place
from library.training.optimizers import set_training

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.plan import EpochPlan
    from library.options.objective import ObjectiveConfig
    from library.options.validation import ValidationConfig
    from library.training.feed import DataFeed
    from library.training.run import Run

# Passes in a row above the best one, and by how much the last of them, before the loss is said to rise.
RISING_PASSES = 3
RISING_SHARE = 0.005


class ValidationDraws(Draws):
    """Draws that are functions of seed, batch and timestep alone; `timestep` is the one that is looked at."""

    timestep = 0

    def generator(self, name: str, place: Place) -> torch.Generator:
        return super().generator(f"validation {name} {self.timestep}", place)

    def timesteps(self, place: Place, count: int, config: ObjectiveConfig) -> torch.Tensor:
        return torch.full((count,), self.timestep, dtype=torch.int64, device=self.device)


@dataclass(slots=True)
class Watch:
    """Tells once when the loss has begun to rise.

    Attributes:
        best, best_step: the lowest loss so far and the update after which it was measured.
        above: passes since then, all of them above it.
        said: it was told.
    """

    best: float | None = None
    best_step: int = 0
    above: int = 0
    said: bool = False

    def see(self, step: int, loss: float) -> str | None:
        """Note a pass; a sentence when this is the one that shows the rise."""
        if self.best is None or loss < self.best:
            self.best, self.best_step, self.above = loss, step, 0
            return None
        self.above += 1
        if self.said or self.above < RISING_PASSES or loss < self.best * (1 + RISING_SHARE):
            return None
        self.said = True
        return (
            f"the validation loss rises since step {self.best_step}: {self.best:.4g} there, {loss:.4g} now; "
            f"the weights of step {self.best_step} are the best so far, later ones may repeat the training pictures"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass.

    Attributes:
        step: updates done.
        loss: mean over the timesteps.
        by_timestep: mean loss at each.
        average_loss: the same mean for the moving average of the weights, None without one.
    """

    step: int
    loss: float
    by_timestep: dict[int, float]
    average_loss: float | None = None


class NoValidation:
    """Validation of a run without held-out pictures: nothing is due."""

    def before_training(self, run: Run) -> None:
        """Before the first step."""

    def after_update(self, run: Run) -> None:
        """After each update."""

    def after_epoch(self, run: Run, epoch: int) -> None:
        """At the end of epoch `epoch` (1-based)."""

    def at_end(self, run: Run) -> None:
        """After the last update."""

    def state(self) -> dict[str, Any] | None:
        """Plain data from which `load_state` goes on exactly."""
        return None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from `state()`; None changes nothing."""


class Validation(NoValidation):
    """Decides whether a step or epoch is one for a pass, and makes it.

    Args:
        config: when, and how many batches.
        feed: of the held-out pictures, one micro-step an update.
        objective: says the range of timesteps.
        seed: of noise and VAE draws.
        device: where noise is drawn.
        live: the caller's namespace, where third-party hooks read the timesteps that they should draw from.
    """

    def __init__(
        self,
        config: ValidationConfig,
        *,
        feed: DataFeed,
        objective: ObjectiveConfig,
        seed: int,
        device: torch.device,
        live: Any = None,
    ) -> None:
        self.config = config
        self.feed = feed
        self.timesteps = validation_timesteps(objective)
        self.draws = ValidationDraws(seed, device)
        self.live = live
        self.watch = Watch()
        self.last: Measured | None = None

    def before_training(self, run: Run) -> None:
        """A first pass, to compare the later ones with."""
        if run.position.step == 0:
            self._report(run, "step")

    def after_update(self, run: Run) -> None:
        every = self.config.validate_every_n_steps
        if every and run.position.step % every == 0:
            self._report(run, "step")

    def after_epoch(self, run: Run, epoch: int) -> None:
        every = self.config.validate_every_n_epochs
        if every is None and self.config.validate_every_n_steps is None:
            every = 1
        if every and epoch % every == 0:
            self._report(run, "epoch")

    def at_end(self, run: Run) -> None:
        """The weights that are saved last have a validation loss too."""
        if self.last is None or self.last.step != run.position.step:
            self._report(run, "step")

    def _report(self, run: Run, kind: str) -> None:
        with run.log.aside(run):
            seen = self.last is not None and self.last.step == run.position.step
            measured = self.last if seen and self.last is not None else self.measure(run)
        self.last = measured
        values = {
            f"loss/validation/{kind}_average": measured.loss,
            f"loss/validation/{kind}_divergence": measured.loss - run.log.recorder.moving_average,
            **{f"loss/validation/timestep_{t}": loss for t, loss in measured.by_timestep.items()},
        }
        if measured.average_loss is not None:
            values[f"loss/validation/ema_{kind}_average"] = measured.average_loss
        run.log.log_apart(run, values)
        if seen:
            return
        run.log.event(run, "validation", loss=measured.loss, timesteps=measured.by_timestep, ema=measured.average_loss)
        log.info("validation loss %.4g after step %d", measured.loss, measured.step)
        rising = self.watch.see(measured.step, measured.loss)
        if rising:
            log.warning("%s", rising)
            run.log.event(run, "notice", text=rising)

    def measure(self, run: Run) -> Measured:
        """A pass over the held-out pictures, and one with the moving average of the weights where there is one."""
        set_training(run.optimizer, False)
        try:
            losses = self._losses(run)
            average = None
            if run.ema:
                with run.ema.in_place():
                    average = self._losses(run)
        finally:
            set_training(run.optimizer, True)
        by_timestep = dict(zip(self.timesteps, losses, strict=True))
        return Measured(run.position.step, _mean(losses), by_timestep, None if average is None else _mean(average))

    @torch.no_grad()
    def _losses(self, run: Run) -> list[float]:
        """Mean loss over the pictures at each timestep; one read from the device."""
        plan = self._plan()
        device = run.processes.device
        sums = torch.zeros(len(self.timesteps), device=device)
        pictures = 0
        modules = [*run.target.model.text_encoders, run.target.model.unet, *run.target.extra_modules()]
        with evaluation_mode(modules), self._borrowed(run):
            for position, batch in enumerate(self.feed.batches(plan, 0, run.max_steps)):
                count = own_pictures(plan, run.processes.rank, position)
                pictures += count
                losses = self._batch_losses(run, batch, replace(self.feed.place(plan.epoch, position), epoch=0))
                sums += torch.stack(losses).to(device) * count
        total = run.processes.reduce_mean(torch.cat([sums, torch.full((1,), float(pictures), device=device)])).tolist()
        return [value / total[-1] for value in total[:-1]]

    def _batch_losses(self, run: Run, batch: Batch, place: Place) -> list[torch.Tensor]:
        self.draws.timestep = 0
        latents = run.latents(batch, place)
        encoder, run.latents = run.latents, lambda *_: latents  # encoded once for all timesteps
        losses = []
        try:
            for timestep in self.timesteps:
                self.draws.timestep = timestep
                self._tell_hooks(timestep, timestep)
                self.draws.seed_modules(place)
                run.target.on_step_start(batch)
                losses.append(run.target.compute_loss(run, batch, place)[0].detach().float().reshape(()))
        finally:
            run.latents = encoder
        run.target.on_validation_batch_end(batch)
        return losses

    def _plan(self) -> EpochPlan:
        """The same batches in every pass."""
        plan = self.feed.plan(1)
        return replace(plan, batches=tuple(own[: self.config.max_validation_steps] for own in plan.batches))

    @contextlib.contextmanager
    def _borrowed(self, run: Run) -> Iterator[None]:
        """The run with validation's draws; afterwards as it was, the global generators included."""
        draws, latent_draws = run.draws, run.latents.draws
        limits = [getattr(self.live, name, None) for name in ("min_timestep", "max_timestep")]
        python_state = random.getstate()
        devices = [run.processes.device] if run.processes.device.type == "cuda" else []
        run.draws = run.latents.draws = self.draws
        run.target.validating = True
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            run.draws, run.latents.draws = draws, latent_draws
            run.target.validating = False
            self._tell_hooks(*limits)
            random.setstate(python_state)
            run.log.forget_samples()

    def _tell_hooks(self, low: int | None, high: int | None) -> None:
        if self.live is not None:
            self.live.min_timestep, self.live.max_timestep = low, high

    def state(self) -> dict[str, Any]:
        """Plain data from which `load_state` goes on exactly."""
        return {"watch": asdict(self.watch), "last": asdict(self.last) if self.last else None}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from `state()`; None (a run without validation so far) changes nothing."""
        if state is None:
            return
        self.watch = Watch(**state["watch"])
        last = state["last"]
        self.last = last and Measured(**{**last, "by_timestep": {int(t): v for t, v in last["by_timestep"].items()}})


def own_pictures(plan: EpochPlan, rank: int, position: int) -> int:
    """Pictures of a process's batch, 0 where it only repeats another's to have one at all."""
    own = plan.batches[rank][position]
    return 0 if any(others[position] == own for others in plan.batches[:rank]) else len(own.items)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
