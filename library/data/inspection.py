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
from collections.abc import Callable, Sequence
from typing import Any

from library.data.buckets import Size
from library.data.cache_state import CacheState, Holdings, cache_state
from library.data.dataset import Dataset
from library.data.duplicates import Look, exact_groups, look_at_all, similar_groups
from library.data.group import DatasetGroup
from library.data.listing import list_folder
from library.data.manifest import manifest_hash
from library.data.pairs import uses_masks
from library.data.picture_folder import caption_finder, caption_suffix
from library.data.records import Item, ScanResult, SubsetSettings
from library.data.sample import fits_without_buckets
from library.messages import Progress

CountTokens = Callable[[Sequence[str]], list[int]]
# Tokens that one, two and three chunks of a text encoder hold.
CHUNK_ENDS = (75, 150, 225)
# Sides grown by more than this are worth a warning.
STRONGLY = 2.0
# Captions named as the longest.
LONGEST = 20


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
    looks = _look(items) if read_pictures else None
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
        "validation_pictures": sum(len(scan.validation) for scan in scans),
        "steps": _steps(described, run),
        "datasets": described,
        "captions": _captions(group, scans, count_tokens),
        "files": _files(scans, looks),
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
        "settings": _changed(settings, leave_out=("kind", "resolution", "batch_size", "enable_bucket", "subsets")),
        "subsets": _subsets(dataset),
        "training_uses": dataset.num_train_images,
        "regularisation": _regularisation(dataset),
        "buckets": _buckets(dataset, run),
        "mean_aspect_error": dataset.buckets.mean_ratio_error,
        "too_small": [_sized(item) for item in scan.items if id(item) not in kept],
        "enlarged": _enlarged(dataset),
        "wrong_size": [] if settings.enable_bucket or run.caches_latents else _wrong_sizes(dataset),
        "validation_pictures": len(scan.validation),
    }
    facts["batches"] = sum(bucket["batches"] for bucket in facts["buckets"])
    return facts


def _changed(settings: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(settings)
        if field.name not in leave_out and (value := getattr(settings, field.name)) != field.default
    }


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
            "settings": _changed(subset, leave_out=told),
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


def _captions(group: DatasetGroup, scans: Sequence[ScanResult], count_tokens: CountTokens | None) -> dict[str, Any]:
    tags: Counter[str] = Counter()
    for scan in scans:
        for counts in scan.tag_frequency.values():
            tags.update(counts)
    missing, orphans = _caption_files(group)
    items = [(dataset, item) for dataset in group.datasets for item in dataset.items]
    empty = [item.path for dataset, item in items if not dataset.fixed_caption(item).strip()]
    return {
        "tags": dict(sorted(tags.items(), key=lambda pair: (-pair[1], pair[0]))),
        "missing": missing,
        "orphans": orphans,
        "empty": empty,
        "tokens": None if count_tokens is None else _tokens(items, count_tokens),
    }


def _caption_files(group: DatasetGroup) -> tuple[list[str], list[str]]:
    """Pictures without a caption file, and caption files without a picture, in folders that have caption files."""
    missing: list[str] = []
    orphans: list[str] = []
    seen: set[tuple[str, str]] = set()
    for subset in (subset for dataset in group.with_validation for subset in dataset.subsets):
        if subset.metadata_file or subset.image_dir is None or (subset.image_dir, subset.caption_extension) in seen:
            continue
        seen.add((subset.image_dir, subset.caption_extension))
        try:
            without, alone = _caption_files_of(subset)
        except OSError:  # said in the notes of the scan
            continue
        missing += without
        orphans += alone
    return missing, orphans


def _caption_files_of(subset: SubsetSettings) -> tuple[list[str], list[str]]:
    folder = str(subset.image_dir)
    listing = list_folder(folder)
    find = caption_finder(subset, listing)
    partners = {name: find(name) for name in listing.pictures}
    suffix = os.path.normcase(caption_suffix(subset))
    texts = {name for name in listing.others if os.path.normcase(name).endswith(suffix)}
    without = [os.path.join(folder, name) for name, text in partners.items() if text is None]
    return without, [os.path.join(folder, name) for name in sorted(texts - {*partners.values()})]


def _tokens(items: Sequence[tuple[Dataset, Item]], count_tokens: CountTokens) -> dict[str, Any]:
    """Tokens of the captions as they are without chance, a picture each once."""
    texts = [dataset.fixed_caption(item) for dataset, item in items]
    limits = [dataset.settings.max_token_length or CHUNK_ENDS[0] for dataset, _ in items]
    unique = list(dict.fromkeys(texts))
    counted = dict(zip(unique, count_tokens(unique), strict=True))
    lengths = [counted[text] for text in texts]
    ranked = sorted(range(len(texts)), key=lambda i: -lengths[i])[:LONGEST]
    return {
        "limits": sorted(set(limits)),
        "cut": sum(length > limit for length, limit in zip(lengths, limits, strict=True)),
        "over": {str(end): sum(length > end for length in lengths) for end in CHUNK_ENDS},
        "lengths": {str(length): count for length, count in sorted(Counter(lengths).items())},
        "longest": [
            {"path": items[i][1].path, "tokens": lengths[i], "cut": lengths[i] > limits[i], "caption": texts[i]}
            for i in ranked
        ],
    }


def _look(items: Sequence[Item]) -> dict[str, Look]:
    """Every picture file, read once."""
    paths = list(dict.fromkeys(item.path for item in items if not item.path.endswith(".npz")))
    with Progress(len(paths), "reading pictures") as progress:
        return dict(zip(paths, look_at_all(paths, progress.update), strict=True))


def _files(scans: Sequence[ScanResult], looks: dict[str, Look] | None) -> dict[str, Any]:
    """Unreadable files and duplicates; the latter are None where the pictures were not read."""
    broken = [text for scan in scans for text in scan.broken]
    if looks is None:
        return {"unreadable": broken, "duplicates": None, "similar": None}
    paths, seen = list(looks), list(looks.values())
    broken += [f"{path} ({look.error})" for path, look in looks.items() if look.error]
    return {
        "unreadable": broken,
        "duplicates": [[paths[i] for i in group] for group in exact_groups(seen)],
        "similar": [[paths[i] for i in group] for group in similar_groups(seen)],
    }


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


def problems_of(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What to look at first: level (`error`, `warning` or `info`) and a line of text, the worst first."""
    found: list[tuple[str, str]] = []

    def add(level: str, count: int, what: str, remedy: str = "") -> None:
        if count:
            found.append((level, f"{what}: {count:,}{f' ({remedy})' if remedy else ''}"))

    files, captions = facts["files"], facts["captions"]
    add(
        "error", len(files["unreadable"]), "files that cannot be read", "replace or remove them, or --on_bad_image skip"
    )
    for one in facts["datasets"]:
        add("error", len(one["wrong_size"]), "pictures that do not have the training size", "use --enable_bucket")
        add("warning", len(one["too_small"]), "pictures left out, smaller than bucket_reso_steps")
        strongly = sum(entry["factor"] > STRONGLY for entry in one["enlarged"])
        add(
            "warning", strongly, f"pictures enlarged more than {STRONGLY:g} times", "use larger ones, or leave them out"
        )
        reg = one["regularisation"]
        unused = reg["pictures_found"] - reg["pictures_used"] if reg else 0
        add(
            "warning",
            unused,
            "regularisation pictures not used",
            "there are more uses of them than of training pictures",
        )
        masks = one["masks"]
        if masks and masks["alpha_asked"] and masks["alpha_found"] == 0:
            found.append(("warning", "alpha_mask is on, but no picture has transparent places: the masks do nothing"))
    if not facts["uses"]:
        found.append(("error", "no pictures to train on"))
    add("warning", len(captions["missing"]), "pictures without a caption file")
    add("warning", len(captions["orphans"]), "caption files without a picture")
    add("info", len(captions["empty"]), "pictures with an empty caption")
    if captions["tokens"]:
        limits = " or ".join(map(str, captions["tokens"]["limits"]))
        add("warning", captions["tokens"]["cut"], f"captions longer than {limits} tokens", "their ends are cut off")
    add("warning", len(files["duplicates"] or ()), "the same file more than once", "they count more than others")
    add("warning", len(files["similar"] or ()), "pictures that look the same", "they count more than others")
    order = {"error": 0, "warning": 1, "info": 2}
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda pair: order[pair[0]])]


def size_text(size: Size | None) -> str:
    """`512x768`; `?` where there is none."""
    return f"{size[0]}x{size[1]}" if size else "?"
