"""The data-set report for the terminal: a few screens of lines; what is long is counted and stands on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from library.data.buckets import size_text
from library.data.inspection_captions import CHUNK_ENDS
from library.messages import some
from library.runtime.files import format_bytes

SHOWN = 5


def lines_of(facts: dict[str, Any]) -> list[str]:
    """The report's lines from `library.data.inspection.inspect`."""
    lines = [f"{facts['pictures']:,} pictures, {facts['uses']:,} uses in an epoch"]
    for number, dataset in enumerate(facts["datasets"], 1):
        lines.append("")
        lines += _dataset_lines(number, dataset, facts["family"])
    lines += ["", "steps", *(f"  {line}" for line in facts["steps"]["equation"])]
    lines += ["", "captions", *(f"  {line}" for line in caption_lines(facts["captions"]))]
    lines += ["", "files", *(f"  {line}" for line in file_lines(facts["files"]))]
    remarks = [f"{problem['level']}: {problem['text']}" for problem in facts["problems"]]
    remarks += [f"note: {note}" for note in facts["notes"]]
    lines += ["", *remarks] if remarks else []
    return [*lines, "", f"manifest {facts['manifest_hash']}"]


def _dataset_lines(number: int, dataset: dict[str, Any], family: str) -> Iterator[str]:
    buckets = "buckets" if dataset["enable_bucket"] else "no buckets"
    settings = "".join(f", {text}" for text in setting_texts(dataset["settings"]))
    yield (
        f"data set {number}: {dataset['kind']}, {size_text(dataset['resolution'])}, batch size "
        f"{dataset['batch_size']}, {buckets}{settings}"
    )
    for subset in dataset["subsets"]:
        yield f"  {source_of(subset)}: {use_text(subset)}"
        extra = [*(["regularisation"] if subset["is_reg"] else []), *setting_texts(subset["settings"])]
        if extra:
            yield f"    {', '.join(extra)}"
    if dataset["regularisation"]:
        yield f"  {regularisation_text(dataset)}"
    if dataset["masks"]:
        yield f"  {mask_text(dataset['masks'])}"
    for bucket in dataset["buckets"]:
        enlarged = f", enlarged: {bucket['enlarged']:,}" if bucket["enlarged"] else ""
        yield (
            f"  {size_text(bucket['size'])}: {bucket['pictures']:,} pictures, {bucket['uses']:,} uses, "
            f"{bucket['batches']:,} batches, the last of {bucket['last_batch']}{enlarged}"
        )
    for kind in cache_kinds(family):
        yield f"  {kind} cache: {cache_text(dataset['caches'][kind])}"


def source_of(subset: dict[str, Any]) -> str:
    """Folder or metadata file of a subset, with the folder of its conditioning pictures."""
    source = subset["metadata_file"] or subset["image_dir"] or "?"
    return f"{source} with {subset['conditioning_data_dir']}" if subset["conditioning_data_dir"] else source


def use_text(subset: dict[str, Any]) -> str:
    """`10 pictures x 3 repeats = 30 uses`; regularisation pictures may have other repeats."""
    used, found = subset["pictures_used"], subset["pictures_found"]
    low, high = subset["repeats_used"]
    repeats = str(low) if low == high else f"{low} to {high}"
    text = f"{used:,} pictures x {repeats} repeats = {subset['uses']:,} uses"
    return text if used == found else f"{text} ({found:,} pictures found)"


def regularisation_text(dataset: dict[str, Any]) -> str:
    """How many regularisation pictures are used, and why."""
    reg = dataset["regularisation"]
    return (
        f"Regularisation: {reg['uses']:,} uses of {reg['pictures_used']:,} of {reg['pictures_found']:,} pictures, to "
        f"match {dataset['training_uses']:,} uses of training pictures; loss weight {reg['loss_weight']:g}. "
        "They double the steps of an epoch"
    )


def mask_text(masks: dict[str, Any]) -> str:
    """How many pictures have a mask of the loss."""
    found = masks["alpha_found"]
    by_alpha = "not counted" if found is None else f"{found:,}"
    return (
        f"Masks of the loss, for {masks['pictures']:,} pictures: {masks['from_folder']:,} from a folder, {by_alpha} by "
        "transparent places; a picture without a mask counts fully"
    )


def setting_texts(settings: dict[str, Any]) -> list[str]:
    """Settings that are not the default."""
    return [name if value is True else f"{name} {_plain(value)}" for name, value in settings.items()]


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def caption_lines(captions: dict[str, Any]) -> Iterator[str]:
    """Tags, lengths, files that lack a partner."""
    tags = captions["tags"]
    if tags:
        most = ", ".join(f"{tag} {count}" for tag, count in list(tags.items())[: 2 * SHOWN])
        yield f"different parts: {len(tags):,}; most frequent: {most}"
    tokens = captions["tokens"]
    if tokens is not None:
        over = ", ".join(f"{tokens['over'][str(end)]:,} over {end}" for end in CHUNK_ENDS)
        longest = tokens["longest"][0]["tokens"] if tokens["longest"] else 0
        yield f"tokens: longest {longest}; captions {over}; {tokens['cut']:,} are cut at {_or(tokens['limits'])}"
    for name, text in (
        ("missing", "without a caption file"),
        ("by_class_tokens", "captioned by their class tokens"),
        ("orphans", "caption file without a picture"),
        ("empty", "empty caption"),
    ):
        if captions[name]:
            yield f"{text}: {len(captions[name]):,} ({some(captions[name])})"


def _or(limits: Sequence[int]) -> str:
    return " or ".join(map(str, limits)) or "75"


def file_lines(files: dict[str, Any]) -> Iterator[str]:
    """Unreadable files and duplicates."""
    if files["unreadable"]:
        yield f"cannot be read: {len(files['unreadable']):,} ({some(files['unreadable'])})"
    if files["duplicates"] is None:
        yield "not read: duplicates and files that break off were not looked for (--no_duplicates)"
        return
    for name, text in (
        ("duplicates", "the same file more than once"),
        ("similar", "pictures that look the same"),
        ("leaks", "held out and trained on too"),
    ):
        groups = files[name]
        if groups:
            yield f"{text}: {len(groups):,} times ({some([' = '.join(group) for group in groups])})"
    if not any(files.values()):
        yield "every picture can be read, no two are alike"


def cache_kinds(family: str) -> tuple[str, ...]:
    """What is cached for models of this family."""
    return ("latents", "text") if family == "sdxl" else ("latents",)


def cache_text(holdings: dict[str, Any] | None) -> str:
    """State of one cache in a line."""
    if holdings is None:
        return "not possible, these settings change pictures or captions by chance"
    stale = sum(holdings["stale"].values())
    why = f" ({', '.join(f'{reason}: {count}' for reason, count in holdings['stale'].items())})" if stale else ""
    return (
        f"{holdings['valid']:,} hold, {stale:,} stale{why}, {holdings['missing']:,} missing; "
        f"{format_bytes(holdings['bytes_on_disk'])} on disk, {format_bytes(holdings['bytes_needed'])} more needed"
    )
