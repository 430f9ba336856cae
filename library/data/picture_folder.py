"""One folder of pictures with caption files: what is read there, and what is odd about it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from library.data.image_size import read_bytes
from library.data.index import Facts, picture_facts
from library.data.listing import UNREAD_SUFFIXES, Listing, is_picture, list_folder, map_files, picture_count, with_dot
from library.data.orientation import AS_STORED, orientation_of, turned_size
from library.data.plain_text import decode_text
from library.data.records import Found, Item, Size, SubsetSettings
from library.messages import UserError, some
from library.runtime.files import atomic_write

INFO_FILE = "metadata_cache.json"


def read_folder(subset: SubsetSettings, index: int) -> Found:
    """The pictures of a folder with captions and sizes.

    Args:
        subset: with an `image_dir`.
        index: of the subset in its data set.

    Raises:
        UserError: the folder cannot be read.
    """
    assert subset.image_dir is not None
    cache = os.path.join(subset.image_dir, INFO_FILE)
    if subset.cache_info and (known := _read_info(cache)) is not None:
        folder = Found(notes=[f"captions and sizes come from {cache}: delete it after changes in the folder"])
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
    folder = _read_files(subset, index, listing)
    if subset.cache_info and not folder.broken:
        _write_info(cache, folder.items, as_stored=subset.ignore_exif_orientation)
    return folder


def _read_files(subset: SubsetSettings, index: int, listing: Listing) -> Found:
    folder = Found(notes=_listing_notes(subset, listing))
    find_caption = caption_finder(subset, listing)
    prefix = os.path.join(str(subset.image_dir), "")

    facts = dict(zip(listing.pictures, picture_facts(str(subset.image_dir), listing.pictures), strict=True))
    seen = lru_cache(maxsize=None)(lambda facts: seen_size(facts, subset))  # a few sizes, many pictures
    fallback = subset.class_tokens or ""
    missing: list[str] = []
    used: set[str] = set()

    def read(name: str) -> Item | str:
        """One picture, or a text that says what is broken."""
        path = picture = prefix + name
        try:
            size, orientation = seen(facts[name])
            caption_file = find_caption(name)
            if caption_file is None:
                missing.append(name)
                caption = fallback
            else:
                used.add(caption_file)
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
            return f"{path} ({reason(error)})"

    found = map_files(read, listing.pictures)
    folder.items = [item for item in found if isinstance(item, Item)]
    folder.broken = [text for text in found if isinstance(text, str)]
    if missing:
        folder.notes.append(_missing_note(subset, sorted(missing), listing))
    suffix = os.path.normcase(caption_suffix(subset))
    orphans = [name for name in listing.others if os.path.normcase(name).endswith(suffix) and name not in used]
    if orphans:
        folder.notes.append(
            f"{subset.image_dir}: {len(orphans)} {caption_suffix(subset)} files have no picture ({some(orphans)})"
        )
    return folder


def seen_size(facts: Facts | OSError, subset: SubsetSettings) -> tuple[Size, int]:
    """(width, height) of a picture as it is trained on, and how its stored pixels are turned for that.

    Args:
        facts: what `library.data.index` knows of the file.
        subset: may ask for pictures as they are stored.

    Raises:
        OSError: there are no facts, because the file cannot be read.
    """
    if isinstance(facts, OSError):
        raise facts
    size, orientation = facts
    turned = AS_STORED if subset.ignore_exif_orientation else orientation
    return turned_size(size, turned), turned


def reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return "not a readable picture" if text.startswith("cannot identify image file") else text


def caption_finder(subset: SubsetSettings, listing: Listing) -> Callable[[str], str | None]:
    """A function: name of a picture -> name of its caption file, or None.

    A picture that states a face, `name_cx_cy_w_h`, may also have the file of `name`.
    """
    suffix = caption_suffix(subset)
    ending = os.path.normcase(suffix)
    names = [*listing.others, *listing.pictures] if is_picture(f"x{suffix}") else listing.others
    present = {key: name for name in names if (key := os.path.normcase(name)).endswith(ending)}

    def find(name: str) -> str | None:
        stem = name[: name.rindex(".")]
        found = present.get(os.path.normcase(stem + suffix))
        if found is None and stem.count("_") >= 4:
            found = present.get(os.path.normcase(stem.rsplit("_", 4)[0] + suffix))
        return found

    return find if present else lambda name: None


def caption_suffix(subset: SubsetSettings) -> str:
    """Ending of the subset's caption files, with its dot."""
    return with_dot(subset.caption_extension)


def read_caption(path: str | os.PathLike[str], *, every_line: bool = False) -> str:
    """The first line of a caption file, or all lines that are not blank, joined by line breaks; stripped.

    The text is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        EOFError: the file is empty.
        UnicodeDecodeError: it is no such text.
    """
    text = decode_text(read_bytes(path))
    if not text:
        raise EOFError(str(path))
    if every_line:
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())
    return text.partition("\n")[0].strip()


def _read_info(path: str) -> dict[str, tuple[str, Size, int | None]] | None:
    """File name -> (caption, stored size, EXIF orientation if noted) as `cache_info` left them; None if there is no
    such file or it is broken.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
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


def _listing_notes(subset: SubsetSettings, listing: Listing) -> list[str]:
    folder = str(subset.image_dir)
    notes = []
    unread = Counter(
        suffix for name in listing.others if (suffix := os.path.splitext(name)[1].lower()) in UNREAD_SUFFIXES
    )
    if unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        notes.append(f"{folder}: {kinds} files are not read: convert them to PNG or JPEG")
    below = [name for name in listing.folders if picture_count(os.path.join(folder, name))]
    if listing.pictures:
        stems = [name[: name.rindex(".")] for name in listing.pictures]
        if len(set(stems)) < len(stems):
            times = Counter(stems)
            twins = [name for name, stem in zip(listing.pictures, stems, strict=True) if times[stem] > 1]
            notes.append(f"{folder}: pictures that differ in their ending alone share a caption file: {some(twins)}")
        masks = os.path.normpath(subset.conditioning_data_dir or "")
        below = [name for name in below if name[0] != "." and os.path.normpath(os.path.join(folder, name)) != masks]
        if below:
            notes.append(f"{folder}: pictures in folders below it are not used: {some(below)}")
    elif below:
        notes.append(f"{folder} holds no pictures, but {os.path.join(folder, below[0])} does: name that as image_dir")
    else:
        notes.append(f"{folder} holds no pictures")
    return notes


def _missing_note(subset: SubsetSettings, missing: Sequence[str], listing: Listing) -> str:
    """What pictures without a caption file get, and the extension that was probably meant."""
    suffix = caption_suffix(subset)
    text = "their caption is empty"
    if subset.class_tokens is not None:
        text = f'their caption is "{subset.class_tokens}"'
    note = f"{subset.image_dir}: {len(missing)} pictures have no {suffix} file ({some(missing)}), {text}"
    for other in (".txt", ".caption", ".tags"):
        endings = {stem: end for stem, end in map(os.path.splitext, listing.others) if end.lower() == other}
        stems = (os.path.splitext(name)[0] for name in missing) if endings else ()
        found = [end for stem in stems if (end := endings.get(stem, suffix)) != suffix]
        if found:
            return f"{note}; {len(found)} of them have a {found[0]} file: is caption_extension {found[0]} meant?"
    return note
