"""Looking after cache files without a model: every file read and judged, and those that serve nobody deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from library.data.cache import remove_leftovers
from library.data.cache_tasks import choose_files, collect_tasks
from library.data.dataset import Dataset
from library.data.latents_file import (
    ABSENT,
    BROKEN,
    MOVED,
    OLDER,
    OTHER,
    PICTURE_CHANGED,
    VALID,
    read_header,
    read_latents,
)
from library.data.listing import list_folder
from library.data.text_cache import text_tasks, unknown_origin
from library.data.text_file import CAPTION_CHANGED, FOREIGN, INCOMPLETE, SUFFIX, read_text
from library.data.text_file import judge as judge_text
from library.messages import UserError

NOT_FINITE = "values that are not finite"
HOLDS = (VALID, MOVED, FOREIGN)
# What serves no run whatever its settings; other files that do not hold now may hold for another training.
DEAD = frozenset({BROKEN, NOT_FINITE, PICTURE_CHANGED, CAPTION_CHANGED, OLDER, INCOMPLETE})
# What other programs and this one append to a picture's name in latent cache files.
_SIZED = re.compile(r"(_\d{4,}x\d{4,}_(sd|sdxl))?\.npz$")
# And to the captions' caches of pictures with several captions.
_TEXT = re.compile(r"(_[0-9a-f]{8})?" + re.escape(SUFFIX) + "$")


@dataclass(slots=True)
class Verdicts:
    """Cache files of data sets.

    Attributes:
        held: files that hold.
        missing: files that are not there yet.
        wrong: file -> why it does not hold.
    """

    held: int = 0
    missing: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


def verify(datasets: Sequence[object], family: str, *, text: bool = False) -> Verdicts:
    """Read every cache file that the data sets use, to the last byte.

    Args:
        datasets: members of a group; others than `Dataset`s are left alone.
        family: `sd` or `sdxl`.
        text: the files of text outputs instead of those of latents.
    """
    found = Verdicts()
    for file, verdict in _judged([one for one in datasets if isinstance(one, Dataset)], family, text):
        if verdict not in (ABSENT, OTHER):
            verdict = _whole(file, text) or verdict
        if verdict in HOLDS:
            found.held += 1
        elif verdict in (ABSENT, OTHER):
            found.missing += 1
        else:
            found.wrong[file] = verdict
    return found


def _judged(members: Sequence[Dataset], family: str, text: bool) -> Iterator[tuple[str, str]]:
    """(cache file, what it is) of every picture."""
    if text:
        for dataset in members:
            origin = unknown_origin(dataset)
            for task in (task for tasks in text_tasks([dataset]) for task in tasks):
                yield task.path, judge_text(task.path, task.caption, origin)
        return
    for dataset in members:
        yield from ((item.latents_npz, VALID) for item in dataset.items if item.latents_npz)
    for tasks in collect_tasks(members, family=family):
        for task, verdict in zip(tasks, choose_files(tasks), strict=True):
            yield task.path, verdict


def _whole(file: str, text: bool) -> str | None:
    """What is wrong inside a file whose outside holds."""
    try:
        if text:
            tensors = [tensor for tensor in read_text(file).tensors() if tensor is not None]
        else:
            entry = read_latents(file)
            tensors = [tensor for tensor in (entry.latents, entry.flipped, entry.mask) if tensor is not None]
    except UserError:
        return BROKEN
    return None if all(torch.isfinite(tensor).all() for tensor in tensors) else NOT_FINITE


def prune(datasets: Sequence[object], family: str) -> dict[str, str]:
    """Delete cache files in the data sets' folders that serve nobody: broken ones, those whose picture or caption
    changed or is gone, and what killed runs left. Files of other sizes, models and settings stay.

    Returns:
        file -> why it was deleted.
    """
    members = [one for one in datasets if isinstance(one, Dataset)]
    doomed: dict[str, str] = {}
    for text in (False, True) if family == "sdxl" else (False,):
        wrong = verify(members, family, text=text).wrong
        doomed |= {file: reason for file, reason in wrong.items() if reason in DEAD}
    linked = {os.path.abspath(item.latents_npz) for one in members for item in one.items if item.latents_npz}
    folders = {os.path.dirname(os.path.abspath(item.path)) for one in members for item in one.items}
    for folder in sorted(folders):
        doomed |= {file: "its picture is gone" for file in _orphans(folder) if file not in linked}
    for file in doomed:
        with suppress(FileNotFoundError):
            os.remove(file)
    leftovers = remove_leftovers(os.path.join(folder, "x") for folder in folders)
    return doomed | ({"temporary files": f"{leftovers} of killed runs"} if leftovers else {})


def _orphans(folder: str) -> Iterable[str]:
    """Cache files of a folder without a picture of their name there."""
    listing = list_folder(folder)
    known = {name for picture in listing.pictures for name in (picture, os.path.splitext(picture)[0])}
    for name in listing.others:
        if not name.endswith(".npz") or name.startswith("."):
            continue
        pattern, arrays = (_TEXT, {"hidden_state1"}) if name.endswith(SUFFIX) else (_SIZED, {"latents", "crop_ltrb"})
        stems = {name[: match.start()] for match in pattern.finditer(name)} | {name.removesuffix(".npz")}
        if stems & known:
            continue
        header = read_header(os.path.join(folder, name))
        if header is not None and arrays <= header.shapes.keys():
            yield os.path.join(folder, name)
