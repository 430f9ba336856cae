"""The training loop: epochs of micro-steps, an update every `accumulation` of them. Read it top to bottom.

Between two log points nothing here reads from the device: losses stay where they are computed (`logbook.py`),
non-finite values are masked there and told one update later (`guard.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from library.messages import Interrupted, UserError
from library.runtime.memory import GarbageCollection, explained_out_of_memory
from library.training.interrupt import InterruptFlag

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.plan import EpochPlan
    from library.training.draws import Place
    from library.training.guard import Suspect
    from library.training.run import Run


def train(run: Run) -> None:
    """Train from `run.position` to `run.max_steps`, then write the final file.

    Raises:
        Interrupted: a signal asked for a stop; the state was saved.
        UserError: a loss or gradient was not finite and the state before that update was saved; or out of memory.
    """
    with run.log.recorded(), explained_out_of_memory("training", run.memory_remedies):
        run.samples.before_training(run)
        run.validation.before_training(run)
        run.log.open(run)
        run.moved.start(run)
        run.control.start(run)
        with GarbageCollection() as garbage, InterruptFlag() as interrupt:
            while run.position.step < run.max_steps:
                train_epoch(run, interrupt, garbage)
        stop_if_bad(run, run.guard.check_last())
        run.log.close(run)
        run.moved.after_flush(run)
        run.validation.at_end(run)
        run.saver.at_end(run)


def train_epoch(run: Run, interrupt: InterruptFlag, garbage: GarbageCollection) -> None:
    """The rest of the current epoch: micro-steps from `run.position.micro` on."""
    epoch = run.position.epoch
    plan = run.feed.plan(epoch)
    run.target.on_epoch_start(epoch)
    pending: list[tuple[torch.Tensor, Batch, torch.Tensor | None]] = []

    for batch in run.log.stopwatch.waiting(run.feed.batches(plan, run.position.micro, run.position.step)):
        place = run.feed.place(epoch, run.position.micro)
        last = (run.position.micro + 1) % run.accumulation == 0 or run.position.micro + 1 == len(plan)
        loss, timesteps = micro_step(run, batch, place, last=last)
        pending.append((loss, batch, timesteps))
        run.position.micro += 1
        if not last:
            run.log.note(run, loss, run.target.on_step_end(), updated=False)
            run.log.flush_if_due(run)
            continue

        norm = update(run, pending)
        pending = []
        run.log.note(run, loss, run.target.on_step_end(), norm=norm)
        run.samples.after_update(run)
        run.validation.after_update(run)
        run.saver.after_update(run)
        run.log.flush_if_due(run)
        run.moved.after_flush(run)
        run.control.after_flush(run)
        garbage.step(run.position.step)
        if interrupt.requested or run.control.stop:
            save_and_stop(run)
        if run.position.step >= run.max_steps:
            break

    end_epoch(run, plan)


def micro_step(run: Run, batch: Batch, place: Place, *, last: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Forward and backward of one micro-batch; the last one before an update is told so.

    Returns:
        The batch's mean loss (on the device, before the division by the accumulation) and its timesteps.
    """
    run.draws.seed_modules(place)
    run.target.on_step_start(batch)
    with run.log.work.counted(place.samples):
        loss, timesteps = run.target.compute_loss(run, batch, place)
        scaled = loss * (place.loss_weight / run.accumulation)
        run.parallel.backward(run.scaler.scale(scaled) if run.scaler else scaled, last=last)
    return loss.detach(), timesteps


def update(run: Run, pending: list[tuple[torch.Tensor, Batch, torch.Tensor | None]]) -> torch.Tensor | None:
    """Gradients of all processes together, clip, optimizer and schedule step.

    Returns:
        The norm of the gradients before clipping (on the device), None where it was not measured.
    """
    start = replace(run.position, micro=run.position.micro - len(pending))
    before = (start, run.lr_schedule.state_dict())
    parameters = run.target.trainable_parameters()
    run.parallel.average(run.target.reduce_gradients, run.processes)
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    norm = run.parallel.clip(parameters, run.max_grad_norm)

    # checked before this update is made, so that the state to save is still the one before the bad update
    stop_if_bad(run, run.guard.check_last())
    run.ema.settle()
    finite = run.guard.watch(
        [loss for loss, _, _ in pending],
        None if run.scaler else norm,  # the scaler skips overflowed gradients itself
        image_keys=[key for _, batch, _ in pending for key in batch.get("image_keys") or ()],
        timesteps=torch.cat(steps) if (steps := [t for _, _, t in pending if t is not None]) else None,
        place_to_return=before,
    )
    skipped = False
    if not finite:
        stop_if_bad(run, run.guard.check_last())
    elif run.scaler:
        scale = run.scaler.get_scale()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        skipped = run.scaler.get_scale() < scale
    else:
        run.optimizer.step()
    if not skipped:
        run.lr_schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.position.step += 1
    run.ema.note_update()
    return norm if norm is not None else getattr(run.optimizer, "last_norm", None)


def end_epoch(run: Run, plan: EpochPlan) -> None:
    """Log, save and sample at the end of an epoch, and move on to the next."""
    finished = run.position.epoch
    complete = run.position.micro >= len(plan)
    run.log.end_of_epoch(run)
    run.processes.barrier()
    if complete:
        run.position.epoch, run.position.micro = finished + 1, 0
    run.validation.after_epoch(run, finished)
    run.saver.after_epoch(run, finished)
    run.samples.after_epoch(run, finished)


def save_and_stop(run: Run) -> None:
    """Ctrl-C, SIGTERM or a file asked for it: the step is finished, save everything and say how to go on."""
    stop_if_bad(run, run.guard.check_last())
    run.log.close(run)
    folder = run.saver.save_state_now(run)
    raise Interrupted(f"stopped after step {run.position.step}; go on with --resume {folder}")


def stop_if_bad(run: Run, suspect: Suspect | None) -> None:
    """Save the state before a non-finite update and stop, naming its pictures and timesteps; or go on, if told to."""
    if suspect is None or run.guard.tolerates(suspect):
        return
    position, schedule_state = suspect.place_to_return
    run.position = position
    run.ema.forget_update()
    run.lr_schedule.load_state_dict(schedule_state)
    run.log.forget_after(position.step)
    run.log.close(run)
    folder = run.saver.save_state_now(run)
    raise UserError(
        f"step {position.step + 1}: the loss or a gradient is not a finite number ({suspect.describe()})",
        f"the state before it is in {folder}; try a lower learning rate, --mixed_precision bf16, or --no_half_vae",
    )
