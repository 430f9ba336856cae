"""Builds a run from options: a list of calls, in the order that hooks of third parties expect."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from library.data.debug import debug_dataset
from library.diffusion.schedule import make_schedule
from library.generation.sample_prompts import read_prompts
from library.messages import UserError, log
from library.options.parser import Resolved, resolve
from library.runtime.precision import weight_dtype
from library.runtime.processes import Processes, start_processes
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training import data_setup, model_setup, network_setup
from library.training.draws import Draws
from library.training.feed import DataFeed
from library.training.guard import FiniteGuard
from library.training.hooks import Hooks, refuse_strategy_overrides
from library.training.hub import download_state
from library.training.latents import LatentEncoder, move_vae
from library.training.logbook import LogBook
from library.training.network_record import NetworkRecord
from library.training.optimizers import Built, make_optimizer, require_one_rate
from library.training.report import show_settings
from library.training.run import Position, Run
from library.training.samples import SamplePictures
from library.training.saver import Saver
from library.training.saving import network_extension
from library.training.scaler import make_scaler
from library.training.schedules import make_lr_schedule
from library.training.state import load_state
from library.training.targets.network import NetworkTarget
from library.training.text_outputs import TextCacher
from library.training.trackers import choose_trackers, start_trackers

if TYPE_CHECKING:
    import argparse

    from library.models.family import LoadedModel
    from library.training.network_trainer import NetworkTrainer

MAX_SEED = 2**32 - 1


def network_run(trainer: NetworkTrainer, args: argparse.Namespace, draws: Draws | None = None) -> Run | None:
    """A network training, ready for its first step.

    Args:
        trainer: whose hooks are asked.
        args: from the script's parser, or built by hand; hooks see and may change it.
        draws: random draws instead of the run's own (replay of recorded runs).

    Returns:
        The run; None when there is nothing to train (`--debug_dataset`, `--dry_run`).
    """
    refuse_strategy_overrides(trainer)
    hooks = Hooks(trainer)
    tokenizers, group = prepare_data(trainer, hooks, args)
    if group is None:
        return None
    options = resolve(args, trainer.script)
    module = network_setup.import_network_module(options.network.network_module)
    check_files(options)

    processes, has_trackers = start(options)
    draws = draws or Draws(args.seed, processes.device)
    dtype = weight_dtype(options.precision.mixed_precision)
    model = prepare_model(trainer, hooks, args, options, module, tokenizers, group, draws, processes)
    target, network_args = prepare_target(trainer, hooks, args, options, model, module, group, draws, processes)
    network = target.network

    groups, names = target.parameter_groups()
    built = make_optimizer(groups, options.optimizer)
    require_one_rate(built)
    write_back_optimizer(args, built)
    feed = DataFeed(
        group,
        seed=args.seed,
        processes=processes,
        accumulation=options.loop.gradient_accumulation_steps,
        workers=min(options.loop.max_data_loader_n_workers, available_cores()),
        persistent=options.loop.persistent_data_loader_workers,
        pin_memory=processes.device.type == "cuda",
    )
    steps, epochs = write_back_length(args, feed)
    group.set_max_train_steps(steps)
    schedule = make_lr_schedule(built.optimizer, built.effective_config, steps)

    network.to(processes.device)
    if options.precision.full_fp16 or options.precision.full_bf16:
        network.to(dtype)
    network.prepare_grad_etc(network_setup.encoders_argument(model), model.unet)
    options = effective_options(args, options)

    record = NetworkRecord(
        trainer=trainer,
        args=args,
        options=options,
        feed=feed,
        version=model.version,
        built=built,
        network_args=network_args if options.network.network_args else None,
        epochs=epochs,
    )
    run = Run(
        target=target,
        feed=feed,
        objective=options.objective,
        v_prediction=options.model.v_parameterization,
        noise_schedule=make_schedule(zero_terminal_snr=options.objective.zero_terminal_snr).to(processes.device),
        draws=draws,
        latents=LatentEncoder(
            model.vae,
            lambda latents: trainer.shift_scale_latents(args, latents),
            draws,
            processes.device,
            options.dataset.vae_batch_size if options.dataset.vae_batch_size > 1 else 0,
        ),
        optimizer=built.optimizer,
        lr_schedule=schedule,
        scaler=make_scaler(options.precision, processes.device),
        guard=FiniteGuard(built.optimizer),
        processes=processes,
        autocast=processes.accelerator.autocast if dtype != torch.float32 else contextlib.nullcontext,
        accumulation=feed.accumulation,
        max_grad_norm=options.optimizer.max_grad_norm,
        max_steps=steps,
        epochs=epochs,
        seed=args.seed,
        log=LogBook(
            total=steps,
            pictures_per_update=pictures_per_update(group, feed),
            group_names=names,
            log_to=processes.accelerator.log if has_trackers else None,
            hooks=hooks,
            args=args,
        ),
        saver=Saver(
            options.saving,
            extension=network_extension(options.saving),
            main=processes.is_main,
            metadata=record,
            hub=options.hub,
            live=args,
        ),
        samples=SamplePictures(
            options.samples,
            live=args,
            folder=Path(options.saving.output_dir),
            name=options.saving.output_name,
            hooks=hooks,
            clip_skip=options.model.clip_skip,
            seed=args.seed,
        ),
        position=Position(),
    )
    show_settings(options, run)
    if options.loop.dry_run:
        return None
    if has_trackers:
        start_trackers(processes.accelerator, options.logging, "network_train", vars(args))
    resume(run, options)
    return run


def prepare_data(trainer: NetworkTrainer, hooks: Hooks, args: Any) -> tuple[list[Any], Any]:
    """Tokenizers and the data set group; the group is None after `--debug_dataset`."""
    options = resolve(args, trainer.script)
    if args.seed is None:
        args.seed = random.SystemRandom().randint(0, MAX_SEED)
        log.info("--seed is not given, using %d", args.seed)
    tokenizers = as_list(trainer.load_tokenizer(args))
    group = data_setup.build_data(options, data_setup.NETWORK_SUPPORT, tokenizers, args.seed)
    group.cache_text = TextCacher(trainer.family, options.model.max_token_length, options.dataset.skip_cache_check)
    if options.dataset.debug_dataset:
        debug_dataset(group)
        return tokenizers, None
    write_back_data_options(args)
    hooks.assert_extra_args(args, group)
    return tokenizers, group


def check_files(options: Resolved) -> None:
    """Files that are needed later, looked at before minutes are spent on the model and caches."""
    network, prompts = options.network, options.samples.sample_prompts
    for path in network.base_weights or ():
        network_setup.require_file(path, "--base_weights")
    if network.network_weights:
        network_setup.require_file(network.network_weights, "--network_weights")
    if prompts and Path(prompts).is_file():
        read_prompts(Path(prompts))


def prepare_model(
    trainer: NetworkTrainer,
    hooks: Hooks,
    args: Any,
    options: Resolved,
    module: ModuleType,
    tokenizers: list[Any],
    group: Any,
    draws: Draws,
    processes: Processes,
) -> LoadedModel:
    """The opened, frozen model with base weights merged and caches made."""
    dtype = weight_dtype(options.precision.mixed_precision)
    with processes.in_turn():
        model = model_setup.open_model(trainer, args, dtype, processes.accelerator, tokenizers)
    model_setup.choose_attention(model, options)
    model_setup.freeze(model)
    device = processes.device if options.precision.lowram else "cpu"
    network_setup.merge_base_weights(module, options.network, model, dtype, device)

    vae_dtype = dtype if trainer.cast_vae(args) else torch.float32
    if options.dataset.cache_latents:
        data_setup.cache_group_latents(group, options, trainer.family, model, draws, processes, vae_dtype)
        processes.barrier()
    else:
        move_vae(model.vae, processes.device, vae_dtype)
    hooks.cache_text_outputs(
        args, processes.accelerator, model.unet, model.vae, tokenizers, model.text_encoders, group, dtype
    )
    return model


def prepare_target(
    trainer: NetworkTrainer,
    hooks: Hooks,
    args: Any,
    options: Resolved,
    model: LoadedModel,
    module: ModuleType,
    group: Any,
    draws: Draws,
    processes: Processes,
) -> tuple[NetworkTarget, dict[str, Any]]:
    """The network on the placed model, and the arguments that its module got."""
    dtype = weight_dtype(options.precision.mixed_precision)
    trains_text = trainer.is_train_text_encoder(args)
    trains_unet = not options.network.network_train_text_encoder_only
    draws.seed_creation()
    network, network_args = network_setup.make_network(module, options.network, model)
    if hasattr(network, "prepare_network"):
        network.prepare_network(args)
    max_norm = max_norm_of(network, args)
    place_models(trainer, args, model, processes, dtype)
    network_setup.apply_network(network, options.network, model, trains_text=trains_text, trains_unet=trains_unet)
    trainer.post_process_network(args, processes.accelerator, network, model.text_encoders, model.unet)
    shapes = sum(len(dataset.buckets.sizes) for dataset in group.datasets if hasattr(dataset, "buckets"))
    checkpoint_and_compile(options, trainer, model, network, trains_text, processes, shapes)
    target = NetworkTarget(
        hooks=hooks,
        args=args,
        accelerator=processes.accelerator,
        family=trainer.family,
        model=model,
        network=network,
        weight_dtype=dtype,
        trains_text=trains_text,
        trains_unet=trains_unet,
        weighted_captions=options.model.weighted_captions,
        max_norm=max_norm,
    )
    return target, network_args


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


def place_models(
    trainer: NetworkTrainer, args: Any, model: LoadedModel, processes: Processes, dtype: torch.dtype
) -> None:
    """Cast, layout and device of the frozen parts; the network is attached after this and before compiling."""
    wrap_model(
        model.unet,
        WrapPolicy(device=processes.device, dtype=dtype if trainer.cast_unet(args) else None),
        family=trainer.family.name,
    )
    if trainer.is_text_encoder_not_needed_for_training(args):
        return
    for encoder in model.text_encoders:
        encoder.to(processes.device, dtype if trainer.cast_text_encoder(args) else None)


def checkpoint_and_compile(
    options: Resolved,
    trainer: NetworkTrainer,
    model: LoadedModel,
    network: Any,
    trains_text: bool,
    processes: Processes,
    shapes: int,
) -> None:
    """Gradient checkpointing and regional compile, after the network was attached."""
    precision = options.precision
    wrap_model(
        model.unet,
        WrapPolicy(
            device=processes.device,
            checkpointing_interval=precision.gradient_checkpointing_interval if precision.gradient_checkpointing else 0,
            compile_backend=precision.dynamo_backend if precision.torch_compile else None,
            shapes=max(1, shapes),
        ),
        family=trainer.family.name,
        repeated_block_classes=trainer.family.repeated_block_classes,
    )
    if not precision.gradient_checkpointing:
        return
    model.unet.train()
    network.enable_gradient_checkpointing()
    if trains_text:
        from library.models.text_encoders import enable_gradient_checkpointing

        for index, encoder in enumerate(model.text_encoders):
            enable_gradient_checkpointing(encoder)
            encoder.train()
            trainer.prepare_text_encoder_grad_ckpt_workaround(index, encoder)


def max_norm_of(network: Any, args: Any) -> float | None:
    """`--scale_weight_norms`, or None where the network cannot; written back for hooks and metadata."""
    if args.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        log.warning("--scale_weight_norms has no effect: this network cannot limit its weight norms")
        args.scale_weight_norms = False
    return args.scale_weight_norms or None


def write_back_data_options(args: Any) -> None:
    """Number pairs where the command line had text, as hooks read them."""
    from library.data.config import parse_face_range, parse_resolution

    args.resolution = parse_resolution(args.resolution)
    args.face_crop_aug_range = parse_face_range(args.face_crop_aug_range)


def write_back_optimizer(args: Any, built: Built) -> None:
    """What the optimizer changed (Adafactor), as hooks and metadata read it."""
    args.learning_rate = built.effective_config.learning_rate
    args.lr_scheduler = built.effective_config.lr_scheduler
    if built.ignores_group_rates:
        args.unet_lr = args.text_encoder_lr = None


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
    names = ("learning_rate", "lr_scheduler", "unet_lr", "text_encoder_lr", "scale_weight_norms")
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


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
