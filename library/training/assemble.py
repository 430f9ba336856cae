"""Builds a run from options: a list of calls, in the order that hooks of third parties expect.

What differs between the training scripts stands in their recipes (`recipes/recipe.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data.debug import FOLDER as DEBUG_FOLDER
from library.data.debug import debug_dataset
from library.diffusion.schedule import make_schedule
from library.generation.sample_prompts import read_prompts
from library.messages import UserError, log
from library.options.parser import Resolved, resolve
from library.options.remedies import memory_remedies
from library.runtime.precision import weight_dtype
from library.runtime.processes import Processes, start_processes
from library.training import data_setup, model_setup
from library.training.control import ControlFiles
from library.training.draws import Draws
from library.training.ema import make_average
from library.training.feed import DataFeed
from library.training.fused_backward import require_one_process
from library.training.guard import FiniteGuard
from library.training.hub import download_state
from library.training.idle_parts import set_idle_aside
from library.training.latents import LatentEncoder, move_vae
from library.training.logbook import LogBook
from library.training.optimizers import Built, make_optimizer
from library.training.parallel import make_parallel
from library.training.recipes.recipe import Recipe, Setup
from library.training.report import show_settings
from library.training.run import Position, Run
from library.training.run_facts import make_record, make_work_counter, run_facts
from library.training.samples import SamplePictures
from library.training.saver import Saver
from library.training.scaler import make_scaler
from library.training.schedules import make_lr_schedule
from library.training.state import load_state
from library.training.stochastic_rounding import StochasticRounding
from library.training.text_outputs import TextCacher
from library.training.trackers import choose_trackers, start_trackers
from library.training.validation import NoValidation, Validation

if TYPE_CHECKING:
    import argparse


MAX_SEED = 2**32 - 1
# Options that give parts of what is trained a rate of their own.
RATES = ("unet_lr", "text_encoder_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2")


def build_run(recipe: Recipe, args: argparse.Namespace, draws: Draws | None = None) -> Run | None:
    """A training, ready for its first step.

    Args:
        recipe: what the script does in its own way.
        args: from the script's parser, or built by hand; hooks see and may change it.
        draws: random draws instead of the run's own (replay of recorded runs).

    Returns:
        The run; None when there is nothing to train (`--debug_dataset`, `--dry_run`).
    """
    tokenizers, group = prepare_data(recipe, args)
    if group is None:
        return None
    options = resolve(args, recipe.script)
    check_prompts(options)
    recipe.check(options)

    processes, has_trackers = start(options)
    setup = Setup(
        args=args,
        options=options,
        tokenizers=tokenizers,
        group=group,
        processes=processes,
        parallel=make_parallel(recipe, options, processes),
        draws=draws or Draws(args.seed, processes.device),
        dtype=weight_dtype(options.precision.mixed_precision),
    )
    if processes.is_main:
        data_setup.show_masks(options, group)
    prepare_model(recipe, setup)
    target = recipe.make_target(setup)

    groups, names, idle = set_idle_aside(*target.parameter_groups(), options.optimizer.learning_rate)
    parallel = setup.parallel
    rounding = StochasticRounding(args.seed) if options.precision.full_bf16 and not parallel.spread else None
    fused_groups = options.value("fused_optimizer_groups")
    built = make_optimizer(groups, options.optimizer, fused_groups=fused_groups, rounding=rounding)
    require_one_process(built.optimizer, processes)
    names = [names[source] for source in built.sources]
    write_back_optimizer(args, built)
    feed = make_feed(setup, group, options.loop.gradient_accumulation_steps)
    steps, epochs = write_back_length(args, feed)
    group.set_max_train_steps(steps)
    schedule = make_lr_schedule(built.optimizer, built.effective_config, steps)
    recipe.before_first_step(setup, target)
    idle.freeze()
    setup.options = options = effective_options(args, options)

    run = Run(
        target=target,
        feed=feed,
        objective=options.objective,
        v_prediction=options.model.v_parameterization,
        noise_schedule=make_schedule(zero_terminal_snr=options.objective.zero_terminal_snr).to(processes.device),
        draws=setup.draws,
        latents=LatentEncoder(
            setup.model.vae,
            lambda latents: recipe.scale_latents(args, latents),
            setup.draws,
            processes.device,
            options.dataset.vae_batch_size if options.dataset.vae_batch_size > 1 else 0,
        ),
        optimizer=parallel.take_optimizer(built.optimizer, target.trained_modules().values()),
        lr_schedule=schedule,
        scaler=None if parallel.spread else make_scaler(options.precision, processes.device),
        guard=FiniteGuard(built.optimizer, options.precision.nan_policy, processes, masks=not parallel.spread),
        processes=processes,
        parallel=parallel,
        autocast=processes.autocast if setup.dtype != torch.float32 else contextlib.nullcontext,
        accumulation=feed.accumulation,
        max_grad_norm=0.0 if built.clips else options.optimizer.max_grad_norm,
        max_steps=steps,
        epochs=epochs,
        seed=args.seed,
        log=LogBook(
            total=steps,
            pictures_per_update=pictures_per_update(group, feed),
            group_names=names,
            log_to=processes.accelerator.log if has_trackers else None,
            hooks=recipe.hooks,
            args=args,
            step_logs=recipe.step_logs,
            record=make_record(options, processes),
            work=make_work_counter(options, processes),
        ),
        saver=Saver(
            options.saving,
            extension=recipe.extension(setup),
            main=processes.is_main,
            metadata=recipe.metadata(setup, feed, built, epochs),
            hub=options.hub,
            live=args,
        ),
        samples=SamplePictures(
            options.samples,
            live=args,
            folder=Path(options.saving.output_dir),
            name=options.saving.output_name,
            hooks=recipe.hooks,
            clip_skip=options.model.clip_skip,
            seed=args.seed,
        ),
        position=Position(),
        ema=make_average(options.ema, target.averaged_parameters(), built.optimizer),
        validation=make_validation(setup),
        control=ControlFiles(Path(options.saving.output_dir), options.saving.output_name or "last"),
        memory_remedies=memory_remedies(options),
    )
    if rounding is not None:
        rounding.update_number = lambda: run.position.step
    show_settings(options, run, idle.names)
    if options.loop.dry_run:
        return None
    if has_trackers:
        start_trackers(processes.accelerator, options.logging, recipe.tracker, vars(args))
    resume(run, options)
    if run.log.record is not None:
        run.log.record.start(run_facts(options, run))
    return run


def prepare_data(recipe: Recipe, args: Any) -> tuple[list[Any], Any]:
    """Tokenizers and the data set group; the group is None after `--debug_dataset`."""
    options = resolve(args, recipe.script)
    if args.seed is None:
        args.seed = random.SystemRandom().randint(0, MAX_SEED)
        log.info("--seed is not given, using %d", args.seed)
    tokenizers = recipe.load_tokenizers(args)
    group = data_setup.build_data(options, recipe.support, tokenizers, args.seed)
    recipe.prepare_captions(args, group)
    group.cache_text = TextCacher(recipe.family, options.model.max_token_length, options.dataset.skip_cache_check)
    if options.dataset.debug_dataset:
        debug_dataset(group, recipe.says_token_ids, Path(options.saving.output_dir or ".") / DEBUG_FOLDER)
        return tokenizers, None
    write_back_data_options(args)
    recipe.check_group(args, group)
    return tokenizers, group


def check_prompts(options: Resolved) -> None:
    """The prompt file of the sample pictures, read once before anything heavy is done."""
    prompts = options.samples.sample_prompts
    if prompts and Path(prompts).is_file():
        read_prompts(Path(prompts))


def prepare_model(recipe: Recipe, setup: Setup) -> None:
    """Open the model, frozen, and make the caches."""
    options, processes = setup.options, setup.processes
    with processes.in_turn():
        setup.opened = recipe.open_model(setup)
    model = setup.model
    model_setup.choose_attention(model, options)
    model_setup.freeze(model)
    recipe.after_opening(setup)

    vae_dtype = setup.dtype if recipe.half_vae(setup) else torch.float32
    if options.dataset.cache_latents:
        data_setup.cache_group_latents(setup.group, options, recipe.family, model, setup.draws, processes, vae_dtype)
        processes.barrier()
    else:
        move_vae(model.vae, processes.device, vae_dtype)
    recipe.prepare_text(setup)


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


def make_feed(setup: Setup, group: Any, accumulation: int) -> DataFeed:
    """Data sets as the loop reads them."""
    loop, processes = setup.options.loop, setup.processes
    return DataFeed(
        group,
        seed=setup.args.seed,
        processes=processes,
        accumulation=accumulation,
        workers=min(loop.max_data_loader_n_workers, available_cores()),
        persistent=loop.persistent_data_loader_workers,
        pin_memory=processes.device.type == "cuda",
    )


def start(options: Resolved) -> tuple[Processes, bool]:
    """Join the processes of the launch, with trackers opened; tells whether there are any."""
    choice = choose_trackers(options.logging)
    processes = start_processes(
        mixed_precision=options.precision.mixed_precision,
        gradient_accumulation_steps=options.loop.gradient_accumulation_steps,
        log_with=choice.log_with,
        project_dir=choice.project_dir,
        ddp_timeout=options.distributed.ddp_timeout,
    )
    return processes, choice.log_with is not None


def write_back_data_options(args: Any) -> None:
    """Number pairs where the command line had text, as hooks read them."""
    from library.data.config import parse_face_range, parse_resolution

    args.resolution = parse_resolution(args.resolution)
    args.face_crop_aug_range = parse_face_range(args.face_crop_aug_range)


def write_back_optimizer(args: Any, built: Built) -> None:
    """What the optimizer changed (Adafactor), as hooks and metadata read it."""
    args.learning_rate = built.effective_config.learning_rate
    args.lr_scheduler = built.effective_config.lr_scheduler
    for name in RATES if built.ignores_group_rates else ():
        if hasattr(args, name):
            setattr(args, name, None)


def write_back_length(args: Any, feed: DataFeed) -> tuple[int, int]:
    """Updates and epochs of the whole run; `--max_train_epochs` and `--save_n_epoch_ratio` become numbers."""
    per_epoch = feed.updates_per_epoch
    if args.max_train_epochs is not None:
        args.max_train_steps = args.max_train_epochs * per_epoch
        log.info("%d epochs are %d steps", args.max_train_epochs, args.max_train_steps)
    epochs = -(-args.max_train_steps // per_epoch)
    if args.save_n_epoch_ratio:
        args.save_every_n_epochs = max(1, epochs // args.save_n_epoch_ratio)
    return args.max_train_steps, epochs


def effective_options(args: Any, asked: Resolved) -> Resolved:
    """The options as the run uses them; what counts as given is what was asked for, not what assembly wrote back."""
    names = [name for name in ("learning_rate", "lr_scheduler", *RATES, "scale_weight_norms") if hasattr(args, name)]
    effective = resolve(args, asked.script).replace(**{name: getattr(args, name) for name in names})
    return dataclasses.replace(effective, given=asked.given)


def resume(run: Run, options: Resolved) -> None:
    """Go on from `--resume`, or from `--initial_epoch` / `--initial_step`."""
    loop = options.loop
    if loop.resume:
        folder = Path(loop.resume)
        if options.hub.resume_from_huggingface:
            folder = download_state(loop.resume, options.hub.huggingface_token)
        load_state(run, folder)
        if run.position.step >= run.max_steps:
            raise UserError(
                f"--resume {folder} has done {run.position.step} steps, and --max_train_steps is {run.max_steps}",
                "raise --max_train_steps: it is the total, counted from the first step of the first run",
            )
        return
    if loop.initial_step is not None or loop.initial_epoch is not None:
        set_initial_position(run, loop)


def set_initial_position(run: Run, loop: Any) -> None:
    """Count from a later step; with `--skip_until_initial_step` the data before it is passed over too."""
    per_epoch = run.feed.updates_per_epoch
    step = loop.initial_step if loop.initial_step is not None else (loop.initial_epoch - 1) * per_epoch
    if not 0 <= step < run.max_steps:
        raise UserError(f"the first step would be {step} of {run.max_steps}", "choose an earlier --initial_step")
    run.position.epoch = step // per_epoch + 1
    if loop.skip_until_initial_step:
        run.position.step = step
        run.position.micro = step % per_epoch * run.accumulation


def pictures_per_update(group: Any, feed: DataFeed) -> int:
    sizes = [getattr(dataset, "batch_size", 1) for dataset in group.datasets]
    return max(1, round(sum(sizes) / len(sizes))) * feed.processes.count * feed.accumulation


def available_cores() -> int:
    import os

    return os.cpu_count() or 1
