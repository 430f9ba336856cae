"""Finds a data set's pictures in its folders, with captions and sizes, and says what is wrong or odd there.

Regularisation pictures are balanced against the training pictures, and validation pictures are set apart.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from library.data.captions import tags_of
from library.data.image_size import image_size, read_bytes, size_and_orientation
from library.data.listing import UNREAD_SUFFIXES, Listing, list_folder, picture_count
from library.data.orientation import AS_STORED, orientation_of, turned_size
from library.data.records import DatasetSettings, Item, ScanResult, Size, SubsetSettings
from library.data.validation import hold_out
from library.messages import UserError
from library.runtime.files import atomic_write

INFO_FILE = "metadata_cache.json"
# A folder whose files take longer than this each to open lies on a slow disk or network: threads wait in parallel.
SLOW_FILE_SECONDS = 0.001
SHOWN = 5

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def scan(settings: DatasetSettings, *, seed: int = 0, skip_broken: bool = False) -> ScanResult:
    """The pictures of one data set.

    Args:
        settings: resolved settings, with a resolution.
        seed: decides which pictures are held out where `validation_seed` is not set.
        skip_broken: decode every picture once, and leave out those that cannot be read instead of stopping.

    Raises:
        UserError: a kind that is not supported yet, no resolution, a setting out of range, or pictures or captions
            that cannot be read; it names them.
    """
    _check(settings)
    result = ScanResult(image_counts=[0] * len(settings.subsets))
    regular: list[Item] = []
    regularisation: list[Item] = []
    broken: list[str] = []
    seen: dict[str, str] = {}
    for index, subset in enumerate(settings.subsets):
        note = _unusable(subset, seen)
        if note:
            result.notes.append(note)
            continue
        folder = _read_folder(subset, index, check_pixels=skip_broken)
        result.notes += folder.notes
        broken += folder.broken
        _count_tags(result.tag_frequency, subset, folder.items)
        items = folder.items
        if subset.is_reg:
            regularisation += items
        else:
            items, held_out = hold_out(items, settings, seed)
            regular += items
            result.validation += held_out
        result.image_counts[index] = len(items)
    if broken and not skip_broken:
        raise _unreadable(broken)
    if broken:
        result.notes.append(f"{len(broken)} pictures are left out, they cannot be read: {_some(broken)}")
    result.num_train_images = sum(item.repeats for item in regular)
    result.num_reg_images = sum(item.repeats for item in regularisation)
    if result.num_train_images < result.num_reg_images:
        result.notes.append(
            f"{result.num_reg_images} regularisation pictures for {result.num_train_images} training pictures "
            "(repeats counted): the last ones are not used"
        )
    result.items = regular + balance(regularisation, result.num_train_images)
    result.notes += _size_notes(regular, settings)
    if result.validation:
        result.notes.append(f"{len(result.validation)} pictures are held out for validation")
    return result


def require_pictures(datasets: Sequence[DatasetSettings], scans: Sequence[ScanResult]) -> None:
    """Refuse to go on when no data set has a picture.

    Raises:
        UserError: names the folders that were looked at, with what was odd there.
    """
    if any(result.items for result in scans):
        return
    folders = [subset.image_dir or "?" for settings in datasets for subset in settings.subsets]
    notes = [note for result in scans for note in result.notes]
    if not folders:
        raise UserError("no pictures found", "add subsets with an image_dir")
    why = f" ({'; '.join(notes[:SHOWN])})" if notes else ""
    raise UserError(f"no pictures found in {_some(folders)}{why}", "correct the path, or put pictures there")


def balance(pictures: Sequence[Item], target: int) -> list[Item]:
    """The regularisation pictures that are used, with repeats raised until they make up `target` in sum.

    In the first pass each picture enters with its own repeats until the target is reached, so the sum may exceed it
    by the last picture's repeats; further passes add one repeat at a time.
    """
    used: list[Item] = []
    total = 0
    for item in pictures:
        if total >= target:
            return used
        used.append(item)
        total += item.repeats
    while used and total < target:
        for item in used[: target - total]:
            item.repeats += 1
            total += 1
    return used


def _check(settings: DatasetSettings) -> None:
    if settings.kind != "dreambooth":
        what = "metadata files (--in_json, metadata_file)" if settings.kind == "finetuning" else "ControlNet data sets"
        raise UserError(f"{what} are not supported yet", "use folders of pictures with caption files")
    if settings.resolution is None:
        raise UserError(
            "no training resolution is given", "set --resolution, or resolution in the data-set file, such as 512"
        )
    if settings.batch_size < 1:
        raise UserError(f"batch_size is {settings.batch_size}", "it must be 1 or more")


def _unusable(subset: SubsetSettings, seen: dict[str, str]) -> str | None:
    """Why a subset is left out, or None; remembers its folder."""
    folder = subset.image_dir
    assert folder is not None, "checked with the configuration"
    if subset.num_repeats < 1:
        return f"{folder} is left out: num_repeats is {subset.num_repeats}"
    path = os.path.normcase(os.path.realpath(folder))
    if path in seen:
        return f"{folder} is left out: the same folder is used before as {seen[path]}"
    if not os.path.isdir(folder):
        what = "it is no folder" if os.path.exists(folder) else "it does not exist"
        return f"{folder} is left out: {what}"
    seen[path] = folder
    return None


@dataclass(slots=True)
class Folder:
    """What one subset's folder gave.

    Attributes:
        items: one for each picture, by name.
        notes: what the user should know.
        broken: files that cannot be used, with the reason.
    """

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def _read_folder(subset: SubsetSettings, index: int, *, check_pixels: bool) -> Folder:
    assert subset.image_dir is not None
    cache = os.path.join(subset.image_dir, INFO_FILE)
    if subset.cache_info and (known := _read_info(cache)) is not None:
        folder = Folder(notes=[f"captions and sizes come from {cache}: delete it after changes in the folder"])
        for name, (caption, stored, orientation) in known.items():
            path = os.path.join(subset.image_dir, name)
            turned = AS_STORED if subset.ignore_exif_orientation else _orientation(path, orientation)
            size = turned_size(stored, turned)
            folder.items.append(
                Item(path, path, caption, size, subset.num_repeats, subset.is_reg, index, orientation=turned)
            )
        return folder
    try:
        listing = list_folder(subset.image_dir)
    except OSError as error:
        raise UserError(f"cannot read folder {subset.image_dir} ({error.strerror})", "check its permissions") from error
    folder = _read_files(subset, index, listing, check_pixels=check_pixels)
    if subset.cache_info and not folder.broken:
        _write_info(cache, folder.items, as_stored=subset.ignore_exif_orientation)
    return folder


def _read_files(subset: SubsetSettings, index: int, listing: Listing, *, check_pixels: bool) -> Folder:
    folder = Folder(notes=_listing_notes(str(subset.image_dir), listing))
    find_caption = _caption_finder(subset, listing)
    prefix = os.path.join(str(subset.image_dir), "")

    fallback = subset.class_tokens or ""
    missing = []

    def read(name: str) -> Item | str:
        """One picture, or a text that says what is broken."""
        path = picture = prefix + name
        try:
            size, orientation = seen_size(path, subset)
            if check_pixels:
                _decode(path)
            caption_file = find_caption(name)
            if caption_file is None:
                missing.append(name)
                caption = fallback
            else:
                path = prefix + caption_file
                caption = read_caption(path, every_line=subset.enable_wildcard)
            return Item(
                picture, picture, caption, size, subset.num_repeats, subset.is_reg, index, orientation=orientation
            )
        except UnicodeDecodeError:
            return f"{path} (a caption that is not UTF-8)"
        except EOFError:
            return f"{path} (an empty caption file)"
        except OSError as error:
            return f"{path} ({_reason(error)})"
        except UserError as error:
            return error.problem.removeprefix("cannot read picture ")

    found = _map(read, listing.pictures)
    folder.items = [item for item in found if isinstance(item, Item)]
    folder.broken = [text for text in found if isinstance(text, str)]
    if missing:
        folder.notes.append(_missing_note(subset, sorted(missing), listing))
    return folder


def seen_size(path: str, subset: SubsetSettings) -> tuple[Size, int]:
    """(width, height) of a picture as it is trained on, and how its stored pixels are turned for that.

    Raises:
        OSError: as `image_size`.
    """
    if subset.ignore_exif_orientation:
        return image_size(path), AS_STORED
    size, orientation = size_and_orientation(path)
    return turned_size(size, orientation), orientation


def _decode(path: str) -> None:
    """Read a picture's pixels; a `UserError` says why that fails."""
    from library.data.images import read_image  # brings cv2 and torch, which a scan does not need

    read_image(path)


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return "not a readable picture" if text.startswith("cannot identify image file") else text


def _caption_finder(subset: SubsetSettings, listing: Listing) -> Callable[[str], str | None]:
    """A function: name of a picture -> name of its caption file, or None.

    A picture that states a face, `name_cx_cy_w_h`, may also have the file of `name`.
    """
    suffix = _caption_suffix(subset)
    ending = os.path.normcase(suffix)
    names = (*listing.others, *listing.pictures)
    present = {key: name for name in names if (key := os.path.normcase(name)).endswith(ending)}

    def find(name: str) -> str | None:
        stem = name[: name.rindex(".")]
        found = present.get(os.path.normcase(stem + suffix))
        if found is None and stem.count("_") >= 4:
            found = present.get(os.path.normcase(stem.rsplit("_", 4)[0] + suffix))
        return found

    return find if present else lambda name: None


def _caption_suffix(subset: SubsetSettings) -> str:
    suffix = subset.caption_extension
    return suffix if suffix.startswith(".") else f".{suffix}"


def read_caption(path: str | os.PathLike[str], *, every_line: bool = False) -> str:
    """The first line of a caption file, or all lines that are not blank, joined by line breaks; stripped.

    The text is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        EOFError: the file is empty.
        UnicodeDecodeError: it is no such text.
    """
    data = read_bytes(path)
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    text = text.removeprefix("\ufeff")
    if not text:
        raise EOFError(str(path))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if every_line:
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())
    return text.partition("\n")[0].strip()


def _map(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """Apply a function that opens files: one after the other, or in threads where the first ones were slow."""
    trial, rest = arguments[:16], arguments[16:]
    start = time.perf_counter()
    results = [function(argument) for argument in trial]
    if not rest or time.perf_counter() - start < SLOW_FILE_SECONDS * len(trial):
        return results + [function(argument) for argument in rest]
    with ThreadPoolExecutor(16) as pool:
        return results + list(pool.map(function, rest))


def _read_info(path: str) -> dict[str, tuple[str, Size, int | None]] | None:
    """File name -> (caption, stored size, EXIF orientation if noted) as `cache_info` left them; None if there is no
    such file or it is broken.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
        return {
            re.split(r"[\\/]", key)[-1]: (
                str(entry["caption"]),
                (int(entry["resolution"][0]), int(entry["resolution"][1])),
                entry.get("orientation"),
            )
            for key, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_info(path: str, items: Iterable[Item], *, as_stored: bool) -> None:
    # sizes as stored, as other programs write and read them, which know no orientation
    entries = {
        item.path: {
            "caption": item.caption,
            "resolution": list(turned_size(item.size, item.orientation)),
            "orientation": _orientation(item.path, None if as_stored else item.orientation),
        }
        for item in items
    }
    with atomic_write(path, "w") as file:
        json.dump(entries, file, ensure_ascii=False, indent=2)


def _orientation(path: str, noted: int | None) -> int:
    """A picture's EXIF orientation, from its file where it is not noted (by other programs)."""
    if noted in range(1, 9):
        return int(noted)
    try:
        return orientation_of(path)
    except OSError:  # a picture that went is named when it is used
        return AS_STORED


def _count_tags(table: dict[str, dict[str, int]], subset: SubsetSettings, items: Iterable[Item]) -> None:
    assert subset.image_dir is not None
    counts = Counter(table.setdefault(folder_name(subset.image_dir), {}))
    for item in items:
        for tag in tags_of(item.caption):
            counts[tag] += 1
    table[folder_name(subset.image_dir)] = dict(counts)


def folder_name(path: str) -> str:
    """Last part of a folder's path, also where it ends in a slash."""
    return os.path.basename(os.path.normpath(path))


def _listing_notes(folder: str, listing: Listing) -> list[str]:
    notes = []
    unread = Counter(
        suffix for name in listing.others if (suffix := os.path.splitext(name)[1].lower()) in UNREAD_SUFFIXES
    )
    if unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        notes.append(f"{folder}: {kinds} files are not read: convert them to PNG or JPEG")
    if listing.pictures:
        return notes
    below = [name for name in listing.folders if picture_count(os.path.join(folder, name))]
    if below:
        notes.append(f"{folder} holds no pictures, but {os.path.join(folder, below[0])} does: name that as image_dir")
    else:
        notes.append(f"{folder} holds no pictures")
    return notes


def _missing_note(subset: SubsetSettings, missing: Sequence[str], listing: Listing) -> str:
    """What pictures without a caption file get, and the extension that was probably meant."""
    suffix = _caption_suffix(subset)
    text = "their caption is empty"
    if subset.class_tokens is not None:
        text = f'their caption is "{subset.class_tokens}"'
    note = f"{subset.image_dir}: {len(missing)} pictures have no {suffix} file ({_some(missing)}), {text}"
    for other in (".txt", ".caption", ".tags"):
        texts = {name for name in listing.others if name.endswith(other)}
        count = sum(os.path.splitext(name)[0] + other in texts for name in missing) if texts else 0
        if other != suffix and count:
            return f"{note}; {count} of them have a {other} file: is caption_extension {other} meant?"
    return note


def _size_notes(items: Iterable[Item], settings: DatasetSettings) -> list[str]:
    assert settings.resolution is not None
    if settings.bucket_no_upscale:
        return []
    area = settings.resolution[0] * settings.resolution[1]
    small = [item.path for item in items if item.size[0] * item.size[1] * 4 < area]
    if not small:
        return []
    width, height = settings.resolution
    return [f"{len(small)} pictures are enlarged more than twice to {width}x{height} ({_some(small)})"]


def _unreadable(broken: Sequence[str]) -> UserError:
    if len(broken) == 1:
        return UserError(f"cannot read {broken[0]}", "replace or remove the file")
    return UserError(f"cannot read {len(broken)} files: {_some(broken)}", "replace or remove them")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
