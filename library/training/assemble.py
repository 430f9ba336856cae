"""Builds a run from options: a list of calls, in the order that hooks of third parties expect.

What differs between the training scripts stands in their recipes (`recipes/recipe.py`), the single parts of a run are
made in `run_parts.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data.debug import FOLDER as DEBUG_FOLDER
from library.data.debug import debug_dataset
from library.generation.sample_prompts import read_prompts
from library.messages import UserError, log
from library.options.parser import Resolved, resolve
from library.runtime.precision import weight_dtype
from library.runtime.processes import start_processes
from library.training import data_setup, model_setup
from library.training.draws import Draws
from library.training.hub import download_state
from library.training.latents import move_vae
from library.training.optimizers import require_optimizer
from library.training.parallel import make_parallel
from library.training.recipes.recipe import Recipe, Setup
from library.training.report import show_settings
from library.training.run_facts import run_facts
from library.training.run_parts import make_feed, make_run, make_updates
from library.training.state import load_state, require_state_folder
from library.training.text_outputs import TextCacher
from library.training.trackers import choose_trackers, start_trackers
from library.training.write_back import effective_options, write_back_data_options, write_back_length

if TYPE_CHECKING:
    import argparse

    from library.training.run import Run


MAX_SEED = 2**32 - 1


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
    check_early(options)
    recipe.check(options)
    setup = start(recipe, args, options, tokenizers, group, draws)
    prepare_model(recipe, setup)
    target = recipe.make_target(setup)

    feed = make_feed(setup, group, options.loop.gradient_accumulation_steps)
    epochs = write_back_length(args, feed)
    group.set_max_train_steps(args.max_train_steps)
    updates = make_updates(setup, target, args.max_train_steps)
    recipe.before_first_step(setup, target)
    updates.idle.freeze()
    setup.options = options = effective_options(args, options)
    run = make_run(recipe, setup, target, feed, updates, epochs)

    show_settings(options, run, updates.idle.names)
    if options.loop.dry_run:
        return None
    if setup.has_trackers:
        start_trackers(setup.processes.accelerator, options.logging, recipe.tracker, vars(args))
    resume(run, options)
    if run.log.record is not None:
        run.log.record.start(run_facts(options, run))
    return run


def start(
    recipe: Recipe,
    args: argparse.Namespace,
    options: Resolved,
    tokenizers: list[Any],
    group: Any,
    draws: Draws | None,
) -> Setup:
    """Join the processes of the launch, and choose the way in which they work together."""
    trackers = choose_trackers(options.logging)
    processes = start_processes(
        mixed_precision=options.precision.mixed_precision,
        gradient_accumulation_steps=options.loop.gradient_accumulation_steps,
        log_with=trackers.log_with,
        project_dir=trackers.project_dir,
        ddp_timeout=options.distributed.ddp_timeout,
    )
    if processes.is_main:
        data_setup.show_masks(options, group)
    return Setup(
        args=args,
        options=options,
        tokenizers=tokenizers,
        group=group,
        processes=processes,
        has_trackers=trackers.log_with is not None,
        parallel=make_parallel(recipe, options, processes),
        draws=draws or Draws(args.seed, processes.device),
        dtype=weight_dtype(options.precision.mixed_precision),
    )


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


def check_early(options: Resolved) -> None:
    """Optimizer, state folder and prompt file, looked at before anything heavy is done."""
    require_optimizer(options.optimizer)
    if options.loop.resume and not options.hub.resume_from_huggingface:
        require_state_folder(Path(options.loop.resume))
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
