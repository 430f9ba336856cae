"""Sizes and orientations of a folder's pictures, remembered between runs.

A file whose size and times (of modification and of status change, to the nanosecond) are as before is not opened
again. One index file a folder lies in the user's cache folder (`library.runtime.files.user_cache_folder`); it may be
deleted at any time, and it is replaced as a whole, so that several processes can read and write it at once.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.image_size import OPEN_FLAGS, Size, facts_of_open_file
from library.data.listing import map_files
from library.messages import UserError, log
from library.runtime.files import atomic_write, user_cache_folder

# (size as stored, EXIF orientation); pictures that agree in both share one.
Facts = tuple[Size, int]

# Size, and times of modification and of status change in nanoseconds, of a file.
State = tuple[int, int, int]
Entry = tuple[str, State, Facts]

# Smaller folders are read sooner than an index file is.
FEWEST = 64
# A file that changed so short a time ago may change again without its times showing it.
FRESH_SECONDS = 2.0
# Files that are looked at in one go.
PART = 16
_MARK = f"picture sizes 1 {sys.byteorder}\n".encode()
# Checksum of what follows; bytes of the names; numbers of pictures and of different facts.
_HEADER = struct.Struct("<Iqqq")


@dataclass(slots=True)
class _Index:
    """What is known of a folder: in equal order names, states of the files, and places of their facts in `table`."""

    names: list[str] = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("q"))
    modified: array = field(default_factory=lambda: array("q"))
    changed: array = field(default_factory=lambda: array("q"))
    places: array = field(default_factory=lambda: array("q"))
    table: list[Facts] = field(default_factory=list)

    def entry(self, at: int) -> Entry:
        state = self.sizes[at], self.modified[at], self.changed[at]
        return self.names[at], state, self.table[self.places[at]]


def picture_facts(folder: str | os.PathLike[str], names: Sequence[str]) -> list[Facts | OSError]:
    """Size as stored and EXIF orientation of pictures of one folder.

    Args:
        folder: the folder.
        names: of its files, each once.

    Returns:
        one for each name; an `OSError` where the file cannot be opened or is no picture.
    """
    file = memory_file(folder, "picture_sizes", ".index") if len(names) >= FEWEST else None
    known = _read(file) if file is not None else _Index()
    found: list[Facts | OSError | None] = list(_unchanged(folder, names, known))
    unknown = [position for position, facts in enumerate(found) if facts is None]
    if not unknown:
        return found  # type: ignore[return-value]
    prefix = os.path.join(folder, "")
    fresh = (time.time() - FRESH_SECONDS) * 1e9
    states: dict[str, State] = {}

    def read(position: int) -> Facts | OSError:
        name = names[position]
        try:
            facts, state = _read_file(prefix + name)
        except OSError as error:
            return error
        if state[1] < fresh and state[2] < fresh:
            states[name] = state
        return facts

    shared: dict[Facts, Facts] = {facts: facts for facts in known.table}
    for position, facts in zip(unknown, map_files(read, unknown), strict=True):
        found[position] = facts if isinstance(facts, OSError) else shared.setdefault(facts, facts)
    if file is not None and states:
        _write(file, _merged(known, names, found, states, {names[position] for position in unknown}))
    return found  # type: ignore[return-value]


def facts_of_paths(paths: Iterable[str]) -> dict[str, Facts | OSError]:
    """The same for pictures in any folders, by path."""
    folders: dict[str, dict[str, str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        folders.setdefault(folder, {})[name] = path
    result: dict[str, Facts | OSError] = {}
    for folder, members in folders.items():
        result.update(zip(members.values(), picture_facts(folder or os.curdir, list(members)), strict=True))
    return result


def _read_file(path: str) -> tuple[Facts, State]:
    """What a picture file says, and its state before it was read, so that a later change shows."""
    handle = os.open(path, OPEN_FLAGS)
    try:
        state = os.fstat(handle)
        return facts_of_open_file(handle, path), (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    finally:
        os.close(handle)


def _unchanged(folder: str | os.PathLike[str], names: Sequence[str], known: _Index) -> list[Facts | None]:
    """The known facts of files that did not change."""
    if not known.names:
        return [None] * len(names)
    sizes, modified, changed, places, table = known.sizes, known.modified, known.changed, known.places, known.table
    prefix, handle = os.path.join(folder, ""), None
    if os.stat in os.supports_dir_fd:  # spares the system the way through the folders above
        prefix, handle = "", os.open(folder, os.O_RDONLY)

    def check(part: range) -> list[Facts | None]:
        # one loop without a call for each file: this is most of a second start
        found: list[Facts | None] = []
        for name, at in zip(names[part.start : part.stop], where[part.start : part.stop], strict=True):
            facts = None
            try:
                state = os.stat(prefix + name, dir_fd=handle)
                if (
                    at is not None
                    and state.st_mtime_ns == modified[at]
                    and state.st_size == sizes[at]
                    and state.st_ctime_ns == changed[at]
                ):
                    facts = table[places[at]]
            except OSError:
                pass
            found.append(facts)
        return found

    where: Sequence[int | None] = range(len(names))
    if known.names != names:
        place_of = dict(zip(known.names, range(len(known.names)), strict=True))
        where = [place_of.get(name) for name in names]
    try:
        parts = [range(start, min(start + PART, len(names))) for start in range(0, len(names), PART)]
        return [facts for part in map_files(check, parts, PART) for facts in part]
    finally:
        if handle is not None:
            os.close(handle)


def _merged(
    known: _Index,
    names: Sequence[str],
    found: Sequence[Facts | OSError | None],
    states: dict[str, State],
    unknown: set[str],
) -> _Index:
    """The index with what was read now; names of earlier runs stay unless they outnumber those of this one."""
    entries = [(n, states[n], f) for n, f in zip(names, found, strict=True) if n in states and isinstance(f, tuple)]
    if known.names:
        asked = set(names)
        kept = [at for at, name in enumerate(known.names) if name in asked and name not in unknown]
        others = [at for at, name in enumerate(known.names) if name not in asked]
        entries += [known.entry(at) for at in kept + (others if len(others) <= len(names) else [])]
        entries.sort()
    places: dict[Facts, int] = {}
    for _, _, facts in entries:
        places.setdefault(facts, len(places))
    sizes, modified, changed = (array("q", [state[number] for _, state, _ in entries]) for number in range(3))
    placed = array("q", [places[facts] for _, _, facts in entries])
    return _Index([name for name, _, _ in entries], sizes, modified, changed, placed, list(places))


def memory_file(folder: str | os.PathLike[str], kind: str, suffix: str) -> Path | None:
    """The file in the user's cache folder that remembers one kind of facts about a folder; None without the former."""
    root = user_cache_folder()
    if root is None:
        return None
    path = os.path.normcase(os.path.realpath(folder))
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return root / kind / f"{digest}{suffix}"


def _read(file: Path) -> _Index:
    """An index file; empty where there is none or it is broken."""
    try:
        data = file.read_bytes()
        head = len(_MARK) + _HEADER.size
        checksum, text_length, count, kinds = _HEADER.unpack_from(data, len(_MARK))
        if data[: len(_MARK)] != _MARK or zlib.crc32(data[len(_MARK) + 4 :]) != checksum:
            return _Index()
        text = data[head : head + text_length].decode("utf-8", "surrogateescape")
        numbers = array("q")
        numbers.frombytes(data[head + text_length :])
    except (OSError, ValueError, struct.error):
        return _Index()
    sizes, modified, changed, places = (numbers[count * column : count * (column + 1)] for column in range(4))
    rest = numbers[4 * count :]
    table = [((rest[3 * kind], rest[3 * kind + 1]), rest[3 * kind + 2]) for kind in range(kinds)]
    return _Index(text.split("/") if count else [], sizes, modified, changed, places, table)


def _write(file: Path, index: _Index) -> None:
    text = "/".join(index.names).encode("utf-8", "surrogateescape")
    table = array("q", [number for (width, height), turned in index.table for number in (width, height, turned)])
    columns = (index.sizes, index.modified, index.changed, index.places, table)
    body = _HEADER.pack(0, len(text), len(index.names), len(index.table))[4:]
    body += text + b"".join(column.tobytes() for column in columns)
    try:
        with atomic_write(file) as stream:
            stream.write(_MARK + zlib.crc32(body).to_bytes(4, "little") + body)
    except (UserError, OSError) as error:  # a full or read-only disk costs time at the next start, nothing else
        log.debug("sizes of pictures are not remembered: %s", error)
