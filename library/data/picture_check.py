"""Decodes pictures once before a training starts, so that an unreadable one is named then and not hours later.

What was read whole is remembered in the user's cache folder by size and times of the file, and not read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.data.index import FRESH_SECONDS, memory_file
from library.messages import Progress, UserError
from library.runtime.files import atomic_write

_THREADS = 8
# More names than that say nothing new.
MOST_NAMED = 200

State = list[int]


class UnreadableFiles(UserError):
    """Pictures or captions that cannot be used, each with its reason."""

    files: tuple[str, ...] = ()

    @classmethod
    def of(cls, files: Sequence[str]) -> UnreadableFiles:
        """The error that names them all."""
        if len(files) == 1:
            error = cls(f"cannot read {files[0]}", "replace or remove the file, or give --on_bad_image skip")
        else:
            rest = [f"and {len(files) - MOST_NAMED} more"] if len(files) > MOST_NAMED else []
            remedy = "replace or remove them, or give --on_bad_image skip"
            error = cls(f"cannot read {len(files)} files", remedy, [*files[:MOST_NAMED], *rest])
        error.files = tuple(files)
        return error


def file_and_reason(error: UserError) -> str:
    """`FILE (reason)` of the error that `library.data.images.read_image` raises."""
    return error.problem.removeprefix("cannot read picture ").removeprefix("picture not found: ")


def unreadable(paths: Sequence[str]) -> dict[str, str]:
    """The pictures that cannot be decoded, each with what is wrong.

    Args:
        paths: of picture files; one that is named twice is read once.
    """
    folders: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        folders.setdefault(os.path.dirname(path), []).append(path)
    known = {folder: _remembered(folder) for folder in folders}
    states = {path: _state(path) for members in folders.values() for path in members}
    due = [p for p, state in states.items() if state is None or known[os.path.dirname(p)].get(_name(p)) != state]
    bad = _decode_all(due)
    settled = time.time_ns() - int(FRESH_SECONDS * 1e9)
    for folder, members in folders.items():
        whole = {_name(path): state for path in members if path not in bad and (state := states[path]) is not None}
        whole = {name: state for name, state in whole.items() if max(state[1:]) < settled}
        if any(known[folder].get(name) != state for name, state in whole.items()):
            # names of earlier runs stay unless they outnumber those of this one
            before = known[folder] if len(known[folder]) <= 2 * len(members) else {}
            _remember(folder, {**before, **whole})
    return bad


def _name(path: str) -> str:
    return os.path.basename(path)


def _state(path: str) -> State | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _decode_all(paths: Sequence[str]) -> dict[str, str]:
    if not paths:
        return {}
    bad = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool, Progress(len(paths), "pictures read") as bar:
        for path, problem in zip(paths, pool.map(_problem, paths), strict=True):
            if problem is not None:
                bad[path] = problem
            bar.update()
    return bad


def _problem(path: str) -> str | None:
    from library.data.images import read_image  # brings cv2 and torch, which a scan does not need

    try:
        read_image(path)
    except UserError as error:
        return file_and_reason(error)
    return None


def _file(folder: str) -> Path | None:
    """Where it is remembered which pictures of a folder are whole; None where this user has no cache folder."""
    return memory_file(folder, "picture_checks", ".json")


def _remembered(folder: str) -> dict[str, State]:
    file = _file(folder)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(folder: str, states: dict[str, State]) -> None:
    file = _file(folder)
    if file is None:
        return
    # a cache folder that cannot be written costs time, nothing else
    with contextlib.suppress(UserError, OSError), atomic_write(file, "w") as output:
        json.dump(states, output)
