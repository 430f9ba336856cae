"""Files appear whole or not at all, and a full disk is a sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from library.messages import UserError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_WORDS = re.compile(
    r"no space left|os error 28\b|os error 112\b|quota exceeded|not enough space on the disk"
    r"|PytorchStreamWriter failed writing",
    re.IGNORECASE,
)
MARGIN = 16 * 2**20
# Of this program's folder among those of others.
NAME = "sd-training-toolkit"
# Temporary paths of the files that are being written now.
_partials: set[Path] = set()


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the target's folder; on success it is flushed to disk and takes the target's name.

    For writers that want a path (safetensors, torch.save). The temporary name keeps the target's suffix.
    On any failure the temporary file goes and an earlier target stays untouched. A target that is such a temporary
    path itself (a writer inside a writer) is given as it is, so that messages name the file that the user knows.

    Raises:
        UserError: the disk is full, or the folder may not be written.
    """
    target = Path(target)
    if target in _partials:
        yield target
        return
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(target)
    _partials.add(partial)
    try:
        with _explained(target):
            yield partial
            _flush(partial)
            os.replace(partial, target)
            _flush_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    finally:
        _partials.discard(partial)


@contextlib.contextmanager
def atomic_write(target: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open a file for writing that takes its name only when the block ends without an error.

    Args:
        mode: `wb` or `w`; text is UTF-8 unless `encoding` says otherwise, with line ends as written.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": encoding or "utf-8", "newline": ""}
    with atomic_path(target) as partial, open(partial, mode, **text) as file:
        yield file


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: fill the given folder; it replaces the target as a whole when the block ends."""
    target = Path(target)
    partial = _partial_name(target)
    with _explained(target):
        partial.mkdir(parents=True)
    try:
        with _explained(target):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush(file)
            _swap_folders(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder for results, made with those above it if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror})", "choose another folder") from error
    return path


def no_folder(path: str | os.PathLike[str]) -> str:
    """What is wrong with a path that is no folder."""
    return "is a file, not a folder" if os.path.exists(path) else "does not exist"


def no_file(path: str | os.PathLike[str]) -> str:
    """What is wrong with a path that is no file."""
    return "is a folder, not a file" if os.path.isdir(path) else "does not exist"


def check_room(folder: str | os.PathLike[str], size: int) -> None:
    """Refuse to start writing `size` bytes into `folder` (which need not exist yet) when they cannot fit.

    Raises:
        UserError: names what is needed and what is free.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size + MARGIN:
        raise UserError(
            f"not enough room in {folder}: {format_bytes(size)} needed, {format_bytes(free)} free",
            "free some space or choose another folder",
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of any writer (Python, torch, safetensors) means that the disk or quota is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return bool(_FULL_WORDS.search(str(error)))


def format_bytes(size: int) -> str:
    """A size as people read it: `512 bytes`, `3.2 MB`, `6.9 GB` (powers of ten, as disks are sold)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def user_cache_folder() -> Path | None:
    """Where files go that may be lost at any time and are made again; it need not exist yet.

    `SD_TOOLKIT_CACHE` names it (empty: none); else it is the system's cache folder of this user.
    """
    chosen = os.environ.get("SD_TOOLKIT_CACHE")
    if chosen is not None:
        return Path(chosen).absolute() if chosen else None
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / NAME / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / NAME


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what is wrong with the target (full disk, forbidden folder, a file where a folder must be, ...) into a
    UserError; let every other error through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            remedy = "free some space or choose another folder; an earlier file of this name is unchanged"
            raise UserError(f"the disk is full, {target} was not written", remedy) from error
        if isinstance(error, PermissionError) and _concerns(error, target):
            remedy = "check its permissions, close programs that have it open, or choose another folder"
            raise UserError(f"{target} may not be written", remedy) from error
        if isinstance(error, OSError) and _concerns(error, target):
            raise UserError(
                f"{target} cannot be written ({error.strerror})", "choose another folder or name"
            ) from error
        raise


def _concerns(error: OSError, target: Path) -> bool:
    """Whether the refused path is the target, its temporary twin or a folder above it."""
    path = Path(error.filename) if isinstance(error.filename, str) else target
    return path.parent == target.parent or path in target.parents


def _partial_name(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.partial{target.suffix}")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # A rename is durable only when its folder is; Windows cannot open folders and does not need to.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap_folders(partial: Path, target: Path) -> None:
    old = _partial_name(target) if target.exists() else None
    if old is not None:
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old is not None:
            os.replace(old, target)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    _flush_folder(target.parent)
