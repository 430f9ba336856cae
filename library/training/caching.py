"""Fills the caches of data sets without a training; the tools in `tools/` call it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data import cache_care
from library.data.debug import FOLDER as DEBUG_FOLDER
from library.data.debug import debug_dataset
from library.data.support import SUPPORT
from library.data.text_cache import BATCH_SIZE, require_fixed_captions
from library.messages import UserError, log
from library.models.family import Family, LoadedModel, family
from library.models.partial import load_sdxl_text_encoders, require_family
from library.models.vae import load_vae
from library.options.caching import idle_options
from library.options.sdxl import BUCKET_STEPS, verify_sdxl_training_args
from library.runtime.precision import weight_dtype
from library.runtime.processes import Processes, start_processes
from library.training import data_setup
from library.training.draws import Draws
from library.training.text_outputs import TextCacher

if TYPE_CHECKING:
    from library.options.parser import Resolved

# Files that are named one by one.
SHOWN = 20


def fill_latent_cache(options: Resolved) -> None:
    """What `tools/cache_latents.py` does."""
    chosen = family("sdxl" if options.caching.sdxl else "sd")
    if options.caching.sdxl:
        verify_sdxl_training_args(options.model)
    processes = _start(options)
    source = "" if processes is None else options.model.vae or _model(options, sdxl=options.caching.sdxl)
    group = _open_data(options, chosen)
    if group is None or _took_care(options, group, chosen, text=False):
        return
    assert processes is not None
    with processes.in_turn():
        vae = load_vae(source, scaling_factor=chosen.latent_scale).requires_grad_(False).eval()
    dtype = torch.float32 if options.model.no_half_vae else weight_dtype(options.precision.mixed_precision)
    seed = options.loop.seed if options.loop.seed is not None else random.SystemRandom().randint(0, 2**32 - 1)
    data_setup.cache_group_latents(
        group,
        options.replace(cache_latents=True, cache_latents_to_disk=True),
        chosen,
        LoadedModel(text_encoders=[], vae=vae, unet=torch.nn.Module()),
        Draws(seed, processes.device),
        processes,
        dtype,
    )


def fill_text_cache(options: Resolved) -> None:
    """What `tools/cache_text_encoder_outputs.py` does."""
    chosen = family("sdxl")
    processes = _start(options)
    source = "" if processes is None else _model(options, sdxl=True)
    group = _open_data(options, chosen)
    if group is None or _took_care(options, group, chosen, text=True):
        return
    assert processes is not None
    require_fixed_captions(getattr(group, "with_validation", group.datasets))
    dtype = weight_dtype(options.precision.mixed_precision)
    with processes.in_turn():
        encoders = load_sdxl_text_encoders(source, dtype=dtype, device=processes.device)
    length = options.model.max_token_length
    group.cache_text = TextCacher(
        chosen, length, options.dataset.skip_cache_check, options.caching.text_encoder_batch_size or BATCH_SIZE
    )
    group.cache_text_encoder_outputs(
        chosen.load_tokenizers(False, options.model.tokenizer_cache_dir, length),
        encoders,
        processes.device,
        dtype,
        True,
        processes.is_main,
    )


def _open_data(options: Resolved, chosen: Family) -> Any:
    """The data sets as a training has them; None when they were only to be shown."""
    idle = idle_options(options)
    if idle:
        log.info("without effect on caches: %s", ", ".join(f"--{name}" for name in idle))
    model = options.model
    tokenizers = chosen.load_tokenizers(model.v2, model.tokenizer_cache_dir, model.max_token_length)
    # whoever encodes the pictures finds those that cannot be read; captions need none
    as_cached = options.replace(cache_latents=True)
    group = data_setup.build_data(as_cached, SUPPORT[options.script], tokenizers, options.loop.seed or 0)
    if options.dataset.debug_dataset:
        debug_dataset(group, folder=Path(options.saving.output_dir or ".") / DEBUG_FOLDER)
        return None
    if chosen.name == "sdxl":
        group.verify_bucket_reso_steps(BUCKET_STEPS)
    return group


def _took_care(options: Resolved, group: Any, chosen: Family, *, text: bool) -> bool:
    """Whether `--verify` or `--prune` was asked for, which is done then.

    Raises:
        UserError: files do not hold.
    """
    datasets = getattr(group, "with_validation", group.datasets)
    if options.caching.prune:
        deleted = cache_care.prune(datasets, chosen.name)
        _name_files(deleted)
        log.info("%d cache files deleted", len(deleted))
    if options.caching.verify:
        found = cache_care.verify(datasets, chosen.name, text=text)
        _name_files(found.wrong)
        log.info("cache files: %d hold, %d missing, %d do not hold", found.held, found.missing, len(found.wrong))
        if found.wrong:
            raise UserError(
                f"{len(found.wrong)} cache files do not hold", "start again without --verify, they are made anew"
            )
    return options.caching.prune or options.caching.verify


def _name_files(reasons: dict[str, str]) -> None:
    for file, reason in list(reasons.items())[:SHOWN]:
        log.info("%s: %s", file, reason)
    if len(reasons) > SHOWN:
        log.info("... and %d more", len(reasons) - SHOWN)


def _model(options: Resolved, *, sdxl: bool) -> str:
    source = options.model.pretrained_model_name_or_path
    if not source:
        raise UserError("--pretrained_model_name_or_path missing", "name the model that will be trained")
    require_family(source, sdxl=sdxl)
    return source


def _start(options: Resolved) -> Processes | None:
    """The processes of the launch, of which the first speaks; None where nothing is to be encoded."""
    if options.dataset.debug_dataset or options.caching.verify or options.caching.prune:
        return None
    return start_processes(
        mixed_precision=options.precision.mixed_precision, ddp_timeout=options.distributed.ddp_timeout
    )
