"""What a data set gives to a training, as plain data: the report of `tools/inspect_dataset.py` for programs.

The page and the lines for the terminal (`inspection_page.py`, `inspection_text.py`) are made from it. Counting tokens
is a function that the caller passes in; no model is known here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

from library.data.cache_state import CacheState, Holdings, cache_state
from library.data.dataset import Dataset
from library.data.duplicates import Look, exact_groups, look_at_all, similar_groups
from library.data.group import DatasetGroup
from library.data.inspection_captions import CountTokens, caption_facts
from library.data.inspection_problems import MUCH_LOST, problems_of
from library.data.manifest import manifest_hash
from library.data.pairs import uses_masks
from library.data.records import Item, ScanResult, changed_settings
from library.data.sample import fits_without_buckets
from library.messages import Progress


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a training would do with the data.

    Attributes:
        script: the training script.
        family: `sd` or `sdxl`.
        processes: number of processes that train together.
        accumulation: micro-steps per update.
        max_train_steps, max_train_epochs: its length; epochs win.
        caches_latents: pictures of any size then fit without buckets.
    """

    script: str
    family: str = "sd"
    processes: int = 1
    accumulation: int = 1
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    caches_latents: bool = False


def inspect(
    group: DatasetGroup,
    scans: Sequence[ScanResult],
    run: Run,
    *,
    count_tokens: CountTokens | None,
    read_pictures: bool = True,
) -> dict[str, Any]:
    """All facts; every value can be written as JSON.

    Args:
        group: the data sets, with those of the validation.
        scans: what was found for each of `group.datasets`.
        run: what a training would do.
        count_tokens: captions -> tokens of each without begin and end; None: they are not counted.
        read_pictures: read every picture: duplicates and files that break off are found.
    """
    items = [item for dataset in group.datasets for item in dataset.items]
    held_out = [item for scan in scans for item in scan.validation]
    looks = _look([*items, *held_out]) if read_pictures else None
    described = [_dataset(dataset, scan, run) for dataset, scan in zip(group.datasets, scans, strict=True)]
    states = cache_state(group.datasets, run.family)
    for facts, dataset, state in zip(described, group.datasets, states, strict=True):
        facts["caches"] = _caches(dataset, state)
        facts["masks"] = _masks(dataset, looks)
    facts = {
        "script": run.script,
        "family": run.family,
        "manifest_hash": manifest_hash(items),
        "pictures": len({item.path for item in items}),
        "uses": sum(item.repeats for item in items),
        "validation_pictures": len(held_out),
        "steps": _steps(described, run),
        "datasets": described,
        "captions": caption_facts(group, scans, count_tokens),
        "files": _files(scans, looks, {item.path for item in held_out}),
        "notes": [note for scan in scans for note in scan.notes],
    }
    facts["problems"] = problems_of(facts)
    return facts


def _dataset(dataset: Dataset, scan: ScanResult, run: Run) -> dict[str, Any]:
    settings = dataset.settings
    kept = {id(item) for item in dataset.items}
    facts = {
        "kind": settings.kind,
        "resolution": settings.resolution,
        "batch_size": settings.batch_size,
        "enable_bucket": settings.enable_bucket,
        "settings": changed_settings(
            settings, leave_out=("kind", "resolution", "batch_size", "enable_bucket", "subsets")
        ),
        "subsets": _subsets(dataset),
        "training_uses": dataset.num_train_images,
        "regularisation": _regularisation(dataset),
        "buckets": _buckets(dataset, run),
        "mean_aspect_error": dataset.buckets.mean_ratio_error,
        "too_small": [_sized(item) for item in scan.items if id(item) not in kept],
        "enlarged": _enlarged(dataset),
        "cropped": _cropped(dataset),
        "wrong_size": [] if settings.enable_bucket or run.caches_latents else _wrong_sizes(dataset),
        "validation_pictures": len(scan.validation),
    }
    facts["batches"] = sum(bucket["batches"] for bucket in facts["buckets"])
    return facts


def _subsets(dataset: Dataset) -> list[dict[str, Any]]:
    used: Counter[int] = Counter()
    uses: Counter[int] = Counter()
    repeats: dict[int, list[int]] = {}
    for item in dataset.items:
        used[item.subset] += 1
        uses[item.subset] += item.repeats
        low, high = repeats.get(item.subset, [item.repeats, item.repeats])
        repeats[item.subset] = [min(low, item.repeats), max(high, item.repeats)]
    told = ("kind", "image_dir", "metadata_file", "conditioning_data_dir", "num_repeats", "is_reg")
    return [
        {
            "image_dir": subset.image_dir,
            "metadata_file": subset.metadata_file,
            "conditioning_data_dir": subset.conditioning_data_dir,
            "is_reg": subset.is_reg,
            "pictures_found": dataset.image_counts[index],
            "pictures_used": used[index],
            "repeats": subset.num_repeats,
            "repeats_used": repeats.get(index, [0, 0]),
            "uses": uses[index],
            "settings": changed_settings(subset, leave_out=told),
        }
        for index, subset in enumerate(dataset.subsets)
    ]


def _regularisation(dataset: Dataset) -> dict[str, Any] | None:
    regular = [item for item in dataset.items if item.is_reg]
    found = sum(count for subset, count in zip(dataset.subsets, dataset.image_counts, strict=True) if subset.is_reg)
    if not found:
        return None
    return {
        "pictures_found": found,
        "pictures_used": len(regular),
        "uses_found": dataset.num_reg_images,
        "uses": sum(item.repeats for item in regular),
        "loss_weight": dataset.settings.prior_loss_weight,
    }


def _buckets(dataset: Dataset, run: Run) -> list[dict[str, Any]]:
    together = dataset.settings.batch_size * run.processes
    enlarged = Counter(item.bucket for item in dataset.items if _growth(item) > 1)
    pictures = Counter(item.bucket for item in dataset.items)
    buckets = []
    for size, members in zip(dataset.buckets.sizes, dataset.buckets.members, strict=True):
        batches = -(-len(members) // together)
        last = len(members) - (batches - 1) * together
        buckets.append(
            {
                "size": size,
                "pictures": pictures[size],
                "uses": len(members),
                "batches": batches,
                "last_batch": max(last, run.processes),
                "uses_added": max(0, run.processes - last),
                "enlarged": enlarged[size],
            }
        )
    return buckets


def _growth(item: Item) -> float:
    """By how much a picture is enlarged; at most 1 where it is not."""
    if item.resized is None or min(item.size) < 1:
        return 1.0
    return max(item.resized[0] / item.size[0], item.resized[1] / item.size[1])


def _enlarged(dataset: Dataset) -> list[dict[str, Any]]:
    grown = [(growth, item) for item in dataset.items if (growth := _growth(item)) > 1.0]
    grown.sort(key=lambda pair: -pair[0])
    return [{**_sized(item), "resized": item.resized, "factor": round(growth, 3)} for growth, item in grown]


def _cropped(dataset: Dataset) -> list[dict[str, Any]]:
    """Pictures of which the crop leaves much less, with the share that is lost."""
    cut = [(lost, item) for item in dataset.items if (lost := _lost(item)) > MUCH_LOST]
    cut.sort(key=lambda pair: -pair[0])
    return [{**_sized(item), "bucket": item.bucket, "lost": round(lost, 3)} for lost, item in cut]


def _lost(item: Item) -> float:
    if item.bucket is None or item.resized is None:
        return 0.0
    return 1 - item.bucket[0] * item.bucket[1] / (item.resized[0] * item.resized[1])


def _sized(item: Item) -> dict[str, Any]:
    return {"path": item.path, "size": item.size}


def _wrong_sizes(dataset: Dataset) -> list[dict[str, Any]]:
    base = dataset.resolution
    assert base is not None
    return [
        _sized(item) for item in dataset.items if not fits_without_buckets(item, dataset.subsets[item.subset], base)
    ]


def _steps(datasets: Sequence[dict[str, Any]], run: Run) -> dict[str, Any]:
    """The steps of an epoch, with the lines that lead there."""
    batches = sum(facts["batches"] for facts in datasets)
    per_epoch = math.ceil(batches / run.accumulation)
    lines = []
    exact = 0.0
    for number, facts in enumerate(datasets, 1):
        together = facts["batch_size"] * run.processes
        exact += sum(bucket["uses"] for bucket in facts["buckets"]) / together
        parts = [f"{bucket['uses']}/{together}" for bucket in facts["buckets"]]
        shown = " + ".join(parts[:6]) + (f" + ... ({len(parts)} buckets)" if len(parts) > 6 else "")
        by = (
            f"{facts['batch_size']} pictures x {run.processes} processes"
            if run.processes > 1
            else (f"{facts['batch_size']} pictures a batch")
        )
        lines.append(f"data set {number} ({by}): {shown or '0'}, each rounded up = {facts['batches']} batches")
    if len(datasets) > 1:
        lines.append(" + ".join(str(facts["batches"]) for facts in datasets) + f" = {batches} batches an epoch")
    if run.accumulation > 1:
        lines.append(f"{batches} batches / {run.accumulation} (gradient accumulation), rounded up = {per_epoch} steps")
    lines.append(f"one epoch = {per_epoch} steps" + (" on each process" if run.processes > 1 else ""))
    if run.max_train_epochs is not None:
        steps, epochs = run.max_train_epochs * per_epoch, float(run.max_train_epochs)
        lines.append(f"max_train_epochs {run.max_train_epochs} x {per_epoch} = {steps} steps")
    else:
        steps, epochs = run.max_train_steps, run.max_train_steps / per_epoch if per_epoch else 0.0
        lines.append(f"max_train_steps {steps} / {per_epoch} = {epochs:.4g} epochs")
    return {
        "processes": run.processes,
        "gradient_accumulation_steps": run.accumulation,
        "batches_per_epoch": batches,
        "batches_without_remainders": exact,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": epochs,
        "equation": lines,
    }


def _look(items: Sequence[Item]) -> dict[str, Look]:
    """Every picture file, read once."""
    paths = list(dict.fromkeys(item.path for item in items if not item.path.endswith(".npz")))
    with Progress(len(paths), "reading pictures") as progress:
        return dict(zip(paths, look_at_all(paths, progress.update), strict=True))


def _files(scans: Sequence[ScanResult], looks: dict[str, Look] | None, held_out: set[str]) -> dict[str, Any]:
    """Unreadable files and duplicates; the latter are None where the pictures were not read.

    Groups with held-out pictures beside others stand in `leaks` too: their validation loss says nothing.
    """
    broken = [text for scan in scans for text in scan.broken]
    if looks is None:
        return {"unreadable": broken, "duplicates": None, "similar": None, "leaks": None}
    paths, seen = list(looks), list(looks.values())
    broken += [f"{path} ({look.error})" for path, look in looks.items() if look.error]
    exact = [[paths[i] for i in group] for group in exact_groups(seen)]
    similar = [[paths[i] for i in group] for group in similar_groups(seen)]
    leaks = [group for group in exact + similar if 0 < len(held_out.intersection(group)) < len(group)]
    return {"unreadable": broken, "duplicates": exact, "similar": similar, "leaks": leaks}


def _masks(dataset: Dataset, looks: dict[str, Look] | None) -> dict[str, Any] | None:
    """How many pictures have a mask: a conditioning picture, or transparent places; None where none is asked for."""
    used = [item for item in dataset.items if uses_masks(dataset.subsets[item.subset], dataset.settings.kind)]
    folder = [item for item in used if item.conditioning]
    alpha = [item for item in used if not item.conditioning]
    if not used:
        return None
    seen = None if looks is None else sum(item.path in looks and looks[item.path].transparent for item in alpha)
    return {
        "pictures": len(dataset.items),
        "from_folder": len(folder),
        "alpha_asked": len(alpha),
        "alpha_found": seen if alpha else 0,
    }


def _caches(dataset: Dataset, state: CacheState) -> dict[str, Any]:
    folders = [item.path for item in dataset.items[:1]]
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folders[0]))).free if folders else None
    return {"latents": _holdings(state.latents), "text": _holdings(state.text), "disk_free": free}


def _holdings(holdings: Holdings | None) -> dict[str, Any] | None:
    if holdings is None:
        return None
    return {
        "valid": holdings.valid,
        "missing": holdings.missing,
        "stale": dict(holdings.stale),
        "bytes_on_disk": holdings.bytes_on_disk,
        "bytes_needed": holdings.bytes_needed,
    }
