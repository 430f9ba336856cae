"""The data set group of a run: settings, scan, tokenising, latent cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data import sources
from library.data.cache import cache_latents
from library.data.classic import load_foreign_dataset
from library.data.config import parse_resolution, resolve_datasets
from library.data.config_schema import Support
from library.data.group import DatasetGroup, build_group
from library.data.latents_file import fingerprint
from library.data.masks import count_masks, write_overlays
from library.data.pairs import uses_masks
from library.data.records import DatasetSettings
from library.data.support import with_masks
from library.data.validation import trained_too
from library.messages import UserError, log, some
from library.replaceable import replacement
from library.runtime.processes import Processes
from library.training.caption_tokens import CaptionTokens
from library.training.draws import Draws
from library.training.latents import move_vae
from library.training.model_setup import CacheEncoder
from library.training.saving import DEFAULT_LAST_OUTPUT_NAME

if TYPE_CHECKING:
    from library.models.family import Family, LoadedModel
    from library.options.parser import Resolved


def build_data(options: Resolved, support: Support, tokenizers: list[Any], seed: int) -> DatasetGroup:
    """Scan the folders that the options name and make the group; its `validation` has the held-out pictures.

    Raises:
        UserError: nothing found, or a setting, picture or caption that cannot be used.
    """
    if options.dataset.dataset_class:
        return foreign_group(options, tokenizers)
    support = with_masks(support, bool(options.value("masked_loss")))
    settings = resolve_datasets(options.dataset, support=support, max_token_length=options.model.max_token_length)
    foreign = replacement("config_util", "generate_dataset_group_by_blueprint")
    if foreign is not None:
        return blueprint_group(foreign, settings, tokenizers, seed)
    require_masks(options, settings)
    skip = options.dataset.on_bad_image == "skip"
    paired = any(subset.conditioning_data_dir for one in settings for subset in one.subsets)
    # caching latents reads every picture before the first step anyway
    check = skip or paired or not options.dataset.cache_latents
    # as the launcher sets them; the accelerator may not be there yet
    share = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    scans = sources.scan_all(settings, seed=seed, skip_broken=skip, check_pixels=check, share=share)
    for note in [note for result in scans for note in result.notes]:
        log.info("%s", note)
    sources.require_pictures(settings, scans)
    known = trained_too(scans) if any(scan.validation for scan in scans) else []
    if known:
        log.warning("%d pictures are held out for validation and trained on too: %s", len(known), some(known))
    masks = count_masks(settings, scans)
    if masks is not None:
        log.info("mask used for %d of %d pictures", *masks)
    tokenize = CaptionTokens(tokenizers, options.model.max_token_length)
    return build_group(settings, scans, tokenize=tokenize, seed=seed)


def require_masks(options: Resolved, settings: tuple[DatasetSettings, ...]) -> None:
    """`--masked_loss` only where there are masks; alpha masks count without it too.

    Raises:
        UserError: no data set has masks.
    """
    if options.value("masked_loss") and not any(uses_masks(sub, one.kind) for one in settings for sub in one.subsets):
        where = "in the data-set file" if options.dataset.dataset_config else "beside --train_data_dir"
        raise UserError(
            "--masked_loss: no data set has masks",
            f"give a folder of masks as conditioning_data_dir {where}, or use alpha channels with alpha_mask",
        )


def show_masks(options: Resolved, group: Any) -> None:
    """Write one picture per bucket with its mask over it into the output folder, and say where."""
    if not options.saving.output_dir:
        return
    folder, name = Path(options.saving.output_dir), options.saving.output_name or DEFAULT_LAST_OUTPUT_NAME
    written = write_overlays(group, folder, name)
    if written:
        log.info("masks as they are used are shown in %s, one picture per bucket", written[0].parent)


def foreign_group(options: Resolved, tokenizers: list[Any]) -> Any:
    """The data set of `--dataset_class`: it makes whole batches itself and stands in for the group."""
    group = load_foreign_dataset(
        options.dataset.dataset_class,
        tokenizer=tokenizers if len(tokenizers) > 1 else tokenizers[0],
        max_token_length=options.model.max_token_length,
        resolution=parse_resolution(options.dataset.resolution),
        debug_dataset=options.dataset.debug_dataset,
    )
    group.validation = getattr(group, "validation", None)
    return group


def blueprint_group(make: Callable[[Any], Any], settings: Any, tokenizers: list[Any], seed: int) -> Any:
    """The group that somebody's `config_util.generate_dataset_group_by_blueprint` makes of the settings."""
    from library.training.classic_config import blueprint_of

    tokenizer = tokenizers if len(tokenizers) > 1 else tokenizers[0]
    group = make(blueprint_of(settings, tokenizer=tokenizer).dataset_group)
    for dataset in group.datasets:
        dataset.set_seed(seed)
    return group


def cache_group_latents(
    group: DatasetGroup,
    options: Resolved,
    family: Family,
    model: LoadedModel,
    draws: Draws,
    processes: Processes,
    vae_dtype: torch.dtype,
) -> None:
    """Encode every picture once, before the first step, and send the VAE back."""
    config = options.dataset
    move_vae(model.vae, processes.device, vae_dtype)
    encoder = CacheEncoder(model.vae, draws, processes.device)
    datasets = getattr(group, "with_validation", group.datasets)
    cache_latents(
        datasets,
        encoder,
        batch_size=config.vae_batch_size,
        to_disk=config.cache_latents_to_disk,
        skip_check=config.skip_cache_check,
        family=family.name,
        vae=fingerprint(model.vae),
        dtype=str(vae_dtype).removeprefix("torch."),
        encode_exact=encoder.exact if vae_dtype != torch.float32 else None,
        rank=processes.rank,
        processes=processes.count,
        wait=processes.barrier,
        readers=max(1, min(options.loop.max_data_loader_n_workers, os.cpu_count() or 1)),
    )
    for dataset in datasets:
        if hasattr(dataset, "cache_latents") and not hasattr(dataset, "memory_latents"):
            dataset.cache_latents(model.vae, config.vae_batch_size, config.cache_latents_to_disk, processes.is_main)
    move_vae(model.vae, "cpu")
