"""Which files of a folder are pictures, and what else lies there."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Files that people take for pictures of a data set, though they are not read.
UNREAD_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".psd", ".svg", ".tga", ".tif", ".tiff")
# A folder whose files take longer than this each lies on a slow disk or network: threads wait in parallel.
SLOW_FILE_SECONDS = 0.001
_TRIALS = 16
_PLUGINS = {".avif": ("pillow_avif",), ".jxl": ("pillow_jxl", "jxlpy")}

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@lru_cache(maxsize=1)
def picture_suffixes() -> tuple[str, ...]:
    """Endings of picture files, lower case; AVIF and JPEG XL where Pillow can read them.

    Pillow learns these two by importing a plug-in, so a process that reads pictures calls this once.
    """
    from PIL import features

    found: list[str] = [*SUFFIXES]
    for suffix, modules in _PLUGINS.items():
        if any(_imports(module) for module in modules) or (suffix == ".avif" and features.check("avif")):
            found.append(suffix)
    return tuple(found)


def _imports(module: str) -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
        return True
    return False


@dataclass(slots=True)
class Listing:
    """Contents of one folder, names only, sorted.

    Attributes:
        pictures: names of picture files; none that starts with a dot.
        others: names of all other files.
        folders: names of sub-folders.
    """

    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """What lies directly in a folder. Links are followed; a broken link counts as the file that its name says.

    Raises:
        OSError: the folder cannot be read.
    """
    listing = Listing()
    suffixes = picture_suffixes()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                listing.folders.append(name)
            elif name.lower().endswith(suffixes) and name[0] != ".":
                listing.pictures.append(name)
            else:
                listing.others.append(name)
    for names in (listing.pictures, listing.others, listing.folders):
        names.sort()
    return listing


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture, in any case of letters."""
    return name.lower().endswith(picture_suffixes()) and not name.startswith(".")


def with_dot(ending: str) -> str:
    """The ending of file names, such as `.txt`, also where it was given as `txt`."""
    return ending if ending.startswith(".") else f".{ending}"


def picture_count(folder: str | os.PathLike[str]) -> int:
    """Pictures directly in a folder; 0 if it cannot be read."""
    try:
        return len(list_folder(folder).pictures)
    except OSError:
        return 0


def glob_images(directory: str, base: str = "*") -> list[str]:
    """Sorted paths of the pictures in a folder whose name without ending is `base` (`*`: of all)."""
    names = list_folder(directory).pictures
    return [os.path.join(directory, name) for name in names if base in ("*", os.path.splitext(name)[0])]


def glob_images_pathlib(dir_path: Path, recursive: bool) -> list[Path]:
    """Sorted paths of the pictures in a folder, or also in all folders below it."""
    walked: Iterable[Path] = Path(dir_path).rglob("*") if recursive else Path(dir_path).iterdir()
    return sorted(path for path in walked if is_picture(path.name) and not path.is_dir())


def map_files(function: Callable[[Argument], Result], arguments: Sequence[Argument], files: int = 1) -> list[Result]:
    """Apply a function that opens files: one after the other, or in threads where the first ones were slow.

    Args:
        files: how many it opens.
    """
    count = max(1, _TRIALS // files)
    trial, rest = arguments[:count], arguments[count:]
    start = time.perf_counter()
    results = [function(argument) for argument in trial]
    if not rest or time.perf_counter() - start < SLOW_FILE_SECONDS * len(trial) * files:
        return results + [function(argument) for argument in rest]
    with ThreadPoolExecutor(16) as pool:
        return results + list(pool.map(function, rest))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cyclic garbage meanwhile: it would go through all new records again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()  # and back at once: what was made counts as old, and need not be looked through now
            gc.unfreeze()
            gc.enable()
