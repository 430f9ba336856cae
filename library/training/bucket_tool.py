"""Chooses training sizes for pictures, writes them into a metadata file, and caches the pictures' latents."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from library.data.cache import require_room
from library.data.cache_tasks import Task, collect_tasks
from library.data.cacher import Cacher
from library.data.config import parse_resolution
from library.data.dataset import Dataset
from library.data.index import facts_of_paths
from library.data.latents_file import (
    MOVED,
    VALID,
    CachedLatents,
    SourceState,
    fingerprint,
    judge,
    key_text,
    write_latents,
)
from library.data.metadata_json import Metadata, read_metadata, write_metadata
from library.data.picture_check import file_and_reason
from library.data.picture_folder import reason, seen_size
from library.data.picture_search import find_pictures
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.messages import UserError, log, some
from library.models.converting import describe_source
from library.models.vae import load_vae
from library.options.bucket_tool import BucketToolConfig
from library.runtime.precision import weight_dtype
from library.runtime.processes import start_processes
from library.training.draws import Draws
from library.training.latents import move_vae
from library.training.model_setup import CacheEncoder

DRAWS_SEED = 0


class Preparation:
    """One run of the tool.

    Attributes:
        config: what was asked for.
        metadata: the entries; those of pictures whose latents are written get their training size.
        skipped: pictures that cannot be read, with the reason.
        done: (data set, item) of the pictures with latents.
    """

    def __init__(self, config: BucketToolConfig) -> None:
        resolution = parse_resolution(config.max_resolution, "max_resolution")
        if "," not in config.max_resolution or resolution is None:
            raise UserError(f"--max_resolution {config.max_resolution} is no WIDTH,HEIGHT", "give 512,512 for example")
        if config.recursive and not config.full_path:
            raise UserError(
                "--recursive without --full_path", "add --full_path: in several folders names may come twice"
            )
        self.config = config
        self.resolution = resolution
        self.pictures = find_pictures(config.train_data_dir, recursive=config.recursive)
        self.metadata: Metadata = read_metadata(config.in_json)
        self.skipped: list[str] = []
        self.done: list[Item] = []
        log.info("%d pictures in %s", len(self.pictures), config.train_data_dir)

    def run(self) -> None:
        """Encode the pictures; the metadata file is also written when that is interrupted or fails."""
        dataset = self._dataset()
        try:
            self._encode(dataset)
        finally:
            self._finish()

    def _dataset(self) -> Dataset:
        """The pictures that can be read, sorted into buckets."""
        config = self.config
        if config.bucket_reso_steps % 8:
            log.warning("--bucket_reso_steps %d is no multiple of 8: latents lose a border", config.bucket_reso_steps)
        elif config.bucket_reso_steps % 32:
            log.warning("--bucket_reso_steps %d is no multiple of 32, which SDXL needs", config.bucket_reso_steps)
        subset = SubsetSettings(
            image_dir=config.train_data_dir,
            flip_aug=config.flip_aug,
            alpha_mask=bool(config.alpha_mask),
            ignore_exif_orientation=config.ignore_exif_orientation,
        )
        settings = DatasetSettings(
            resolution=self.resolution,
            enable_bucket=True,
            min_bucket_reso=config.min_bucket_reso,
            max_bucket_reso=config.max_bucket_reso,
            bucket_reso_steps=config.bucket_reso_steps,
            bucket_no_upscale=config.bucket_no_upscale,
            subsets=(subset,),
        )
        items: dict[str, Item] = {}
        for path, facts in facts_of_paths(self.pictures).items():
            try:
                size, orientation = seen_size(facts, subset)
            except OSError as error:
                self.skipped.append(f"{path} ({reason(error)})")
                continue
            file = self._npz(path)
            if file in items:
                log.warning("%s and %s would share %s: the second is used", items[file].path, path, file)
            items[file] = Item(path if config.full_path else Path(path).stem, path, "", size, orientation=orientation)
        return Dataset(settings, ScanResult(items=list(items.values())), tokenize=None, seed=DRAWS_SEED)

    def _npz(self, path: str) -> str:
        if self.config.recursive:
            return os.path.splitext(path)[0] + ".npz"
        return os.path.join(self.config.train_data_dir, f"{Path(path).stem}.npz")

    def _encode(self, dataset: Dataset) -> None:
        config = self.config
        processes = start_processes(mixed_precision=config.mixed_precision)
        vae = load_vae(config.model_name_or_path).requires_grad_(False).eval()
        move_vae(vae, processes.device, weight_dtype(config.mixed_precision))
        due = []
        for tasks in collect_tasks(
            [dataset],
            family=_family(config.model_name_or_path),
            vae=fingerprint(vae),
            dtype=str(vae.dtype).removeprefix("torch."),
        ):
            for task in tasks:
                task.file = self._npz(_item(task).path)
                if config.skip_existing and judge(task.path, task.wanted) in (VALID, MOVED):
                    self.done.append(_item(task))
                else:
                    due.append(task)
        require_room((task.path, task.file_bytes) for task in due)
        encoder = CacheEncoder(vae, Draws(DRAWS_SEED, processes.device), processes.device)
        readers = config.max_data_loader_n_workers or min(8, os.cpu_count() or 1)
        exact = encoder.exact if vae.dtype != torch.float32 else None
        log.info("%d pictures have latents that hold, %d to encode", len(self.done), len(due))
        Cacher(encoder, exact, config.batch_size, readers, self._leave_out).run(due, self._store)

    def _store(self, task: Task, entry: CachedLatents, state: SourceState) -> None:
        write_latents(task.path, entry, key_text(task.wanted, state))
        self.done.append(_item(task))

    def _leave_out(self, task: Task, error: UserError) -> None:
        self.skipped.append(file_and_reason(error))

    def _finish(self) -> None:
        """Write the metadata file and say what was done."""
        order = {path: place for place, path in enumerate(self.pictures)}
        for item in sorted(self.done, key=lambda item: order[item.path]):
            assert item.bucket is not None
            entry = self.metadata.setdefault(item.key, {})
            entry["train_resolution"] = [side // 8 * 8 for side in item.bucket]
        write_metadata(self.config.out_json, self.metadata)
        buckets = Counter(item.bucket for item in self.done if item.bucket is not None)
        for number, (size, count) in enumerate(sorted(buckets.items())):
            log.info("bucket %d %s: %d", number, size, count)
        log.info("mean ar error: %s", _mean_error(self.done))
        if self.skipped:
            log.warning("%d pictures are left out, they cannot be read: %s", len(self.skipped), some(self.skipped))
        log.info("%s: %d entries, %d with latents", self.config.out_json, len(self.metadata), len(self.done))


def prepare_buckets(config: BucketToolConfig) -> None:
    """What `finetune/prepare_buckets_latents.py` does.

    Raises:
        UserError: options, folder, metadata or model that cannot be used, or no picture that can be read.
    """
    run = Preparation(config)
    run.run()
    if run.pictures and not run.done:
        raise UserError(f"no picture in {config.train_data_dir} could be used", "see the messages above")


def _item(task: Task) -> Item:
    dataset, index = task.users[0]
    return dataset.items[index]


def _family(source: str) -> str:
    """The family in the keys of the latents: that of the model; a VAE alone counts as one of SD."""
    try:
        return "sdxl" if describe_source(Path(source)).kind == "sdxl" else "sd"
    except (UserError, OSError):
        return "sd"


def _mean_error(items: list[Any]) -> float:
    """Mean distance of the buckets' aspect ratios from those of the pictures; 0 without pictures."""
    errors = [abs(item.bucket[0] / item.bucket[1] - item.size[0] / item.size[1]) for item in items]
    return sum(errors) / len(errors) if errors else 0.0
