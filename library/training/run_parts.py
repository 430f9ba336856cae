"""The parts of a run that follow from its options, each made by a function of its own; `assemble.py` calls them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion.schedule import make_schedule
from library.messages import log
from library.options.remedies import memory_remedies
from library.training.control import ControlFiles
from library.training.ema import make_average
from library.training.feed import DataFeed
from library.training.fused_backward import require_one_process
from library.training.guard import FiniteGuard
from library.training.idle_parts import IdleParts, set_idle_aside
from library.training.latents import LatentEncoder
from library.training.logbook import LogBook
from library.training.optimizers import Built, make_optimizer
from library.training.run import Position, Run
from library.training.run_facts import make_record, make_work_counter
from library.training.samples import SamplePictures
from library.training.saver import Saver
from library.training.saving import DEFAULT_LAST_OUTPUT_NAME
from library.training.scaler import make_scaler
from library.training.schedules import make_lr_schedule
from library.training.stochastic_rounding import StochasticRounding
from library.training.validation import NoValidation, Validation
from library.training.write_back import write_back_optimizer

if TYPE_CHECKING:
    from library.training.recipes.recipe import Recipe, Setup
    from library.training.targets.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """How the weights change.

    Attributes:
        built: the optimizer.
        schedule: of its rates.
        group_names: one for each of the optimizer's groups.
        idle: parts that a rate of 0 leaves as they are.
        rounding: of bfloat16 weights, None without.
    """

    built: Built
    schedule: Any
    group_names: list[str]
    idle: IdleParts
    rounding: StochasticRounding | None


def make_updates(setup: Setup, target: Target, steps: int) -> Updates:
    """Optimizer and schedule of a run of `steps` updates, over what the target offers."""
    options, args = setup.options, setup.args
    groups, names, idle = set_idle_aside(*target.parameter_groups(), options.optimizer.learning_rate)
    half = options.precision.full_bf16 and not setup.parallel.spread
    rounding = StochasticRounding(args.seed) if half else None
    fused_groups = options.value("fused_optimizer_groups")
    built = make_optimizer(groups, options.optimizer, fused_groups=fused_groups, rounding=rounding)
    require_one_process(built.optimizer, setup.processes)
    write_back_optimizer(args, built)
    return Updates(
        built=built,
        schedule=make_lr_schedule(built.optimizer, built.effective_config, steps),
        group_names=[names[source] for source in built.sources],
        idle=idle,
        rounding=rounding,
    )


def make_run(recipe: Recipe, setup: Setup, target: Target, feed: DataFeed, updates: Updates, epochs: int) -> Run:
    """The run before its first step; `setup.options` are the effective ones."""
    options, processes, parallel = setup.options, setup.processes, setup.parallel
    built = updates.built
    name = options.saving.output_name or DEFAULT_LAST_OUTPUT_NAME
    run = Run(
        target=target,
        feed=feed,
        objective=options.objective,
        v_prediction=options.model.v_parameterization,
        noise_schedule=make_schedule(zero_terminal_snr=options.objective.zero_terminal_snr).to(processes.device),
        draws=setup.draws,
        latents=make_latents(recipe, setup),
        optimizer=parallel.take_optimizer(built.optimizer, target.trained_modules().values()),
        lr_schedule=updates.schedule,
        scaler=None if parallel.spread else make_scaler(options.precision, processes.device),
        guard=FiniteGuard(built.optimizer, options.precision.nan_policy, processes, masks=not parallel.spread),
        processes=processes,
        parallel=parallel,
        autocast=processes.autocast if setup.dtype != torch.float32 else contextlib.nullcontext,
        accumulation=feed.accumulation,
        max_grad_norm=0.0 if built.clips else options.optimizer.max_grad_norm,
        max_steps=setup.args.max_train_steps,
        epochs=epochs,
        seed=setup.args.seed,
        log=make_log(recipe, setup, feed, updates),
        saver=make_saver(recipe, setup, feed, built, epochs),
        samples=make_samples(recipe, setup),
        position=Position(),
        ema=make_average(options.ema, target.averaged_parameters(), built.optimizer),
        validation=make_validation(setup),
        control=ControlFiles(Path(options.saving.output_dir), name),
        memory_remedies=memory_remedies(options),
    )
    if updates.rounding is not None:
        updates.rounding.update_number = lambda: run.position.step
    return run


def make_feed(setup: Setup, group: Any, accumulation: int) -> DataFeed:
    """Data sets as the loop reads them."""
    loop, processes = setup.options.loop, setup.processes
    return DataFeed(
        group,
        seed=setup.args.seed,
        processes=processes,
        accumulation=accumulation,
        workers=min(loop.max_data_loader_n_workers, os.cpu_count() or 1),
        persistent=loop.persistent_data_loader_workers,
        pin_memory=processes.device.type == "cuda",
    )


def make_latents(recipe: Recipe, setup: Setup) -> LatentEncoder:
    """Pictures to latents inside a step."""
    at_once = setup.options.dataset.vae_batch_size
    return LatentEncoder(
        setup.model.vae,
        lambda latents: recipe.scale_latents(setup.args, latents),
        setup.draws,
        setup.processes.device,
        at_once if at_once > 1 else 0,
    )


def make_log(recipe: Recipe, setup: Setup, feed: DataFeed, updates: Updates) -> LogBook:
    """Losses, rates and norms: where they go."""
    options, processes = setup.options, setup.processes
    return LogBook(
        total=setup.args.max_train_steps,
        pictures_per_update=pictures_per_update(feed),
        group_names=updates.group_names,
        log_to=processes.accelerator.log if setup.has_trackers else None,
        hooks=recipe.hooks,
        args=setup.args,
        step_logs=recipe.step_logs,
        record=make_record(options, processes),
        work=make_work_counter(options, processes),
    )


def pictures_per_update(feed: DataFeed) -> int:
    """Of all processes together, where data sets differ their mean."""
    sizes = [getattr(dataset, "batch_size", 1) for dataset in feed.group.datasets]
    return max(1, round(sum(sizes) / len(sizes))) * feed.processes.count * feed.accumulation


def make_saver(recipe: Recipe, setup: Setup, feed: DataFeed, built: Built, epochs: int) -> Saver:
    """Files and states: which, when, with what metadata."""
    return Saver(
        setup.options.saving,
        extension=recipe.extension(setup),
        main=setup.processes.is_main,
        metadata=recipe.metadata(setup, feed, built, epochs),
        hub=setup.options.hub,
        live=setup.args,
    )


def make_samples(recipe: Recipe, setup: Setup) -> SamplePictures:
    """Sample pictures."""
    options = setup.options
    return SamplePictures(
        options.samples,
        live=setup.args,
        folder=Path(options.saving.output_dir),
        name=options.saving.output_name,
        hooks=recipe.hooks,
        clip_skip=options.model.clip_skip,
        seed=setup.args.seed,
    )


def make_validation(setup: Setup) -> NoValidation:
    """The loss on held-out pictures, where there are any."""
    options, group = setup.options, getattr(setup.group, "validation", None)
    if group is None:
        if options.dataset.validation_split:
            log.warning(
                "--validation_split %g holds out no picture: there is no validation loss; give a larger share",
                options.dataset.validation_split,
            )
        return NoValidation()
    given = options.dataset.validation_seed
    return Validation(
        options.validation,
        feed=make_feed(setup, group, accumulation=1),
        objective=options.objective,
        seed=setup.args.seed if given is None else given,
        device=setup.processes.device,
        live=setup.args,
    )
