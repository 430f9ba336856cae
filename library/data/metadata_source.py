"""Pictures that a metadata file names: where they are, their sizes, and latents that were computed before.

Latents of a preparation tool (`.npz` beside the picture, by the picture's name) are used for a whole data set or not
at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from library.data.index import Facts, facts_of_paths
from library.data.latents_file import MOVED, VALID, judge_source, read_header
from library.data.listing import list_folder
from library.data.metadata_file import Entry, caption_of, read_entries
from library.data.picture_folder import reason, seen_size
from library.data.records import DatasetSettings, Found, Item, Size, SubsetSettings
from library.messages import UserError, some
from library.runtime.files import no_folder

UNKNOWN: Size = (0, 0)


@dataclass(slots=True)
class Settled:
    """What became of the pictures of a data set of metadata files.

    Attributes:
        notes: what the user should know.
        broken: files that cannot be used, with the reason; `unusable` their items.
        bucket_sizes: the training sizes, where the metadata say those of all pictures.
    """

    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unusable: list[Item] = field(default_factory=list)
    bucket_sizes: list[Size] | None = None


def read_metadata_subset(subset: SubsetSettings, index: int) -> Found:
    """The pictures of one metadata file, without their sizes, which `settle` reads.

    Args:
        subset: with a `metadata_file`; names in it may be relative to `image_dir`.
        index: of the subset in its data set.

    Raises:
        UserError: the file cannot be read, or `image_dir` is no folder.
    """
    name = str(subset.metadata_file)
    entries = read_entries(name)
    places = _Places(subset.image_dir)
    found = Found(tag_texts=[entry.tags for entry in entries if entry.tags])
    if not entries:
        found.notes.append(f"{name} is left out: it names no pictures")
    for entry in entries:
        picture = places.picture(entry.key)
        latents = places.latents(entry.key, picture)
        if picture is None and latents is None:
            found.broken.append(f"{entry.key} (named in {name}, not found{places.where()})")
            continue
        item = Item(
            entry.key,
            picture or str(latents),
            caption_of(entry, subset),
            entry.image_size or UNKNOWN,
            subset.num_repeats,
            subset=index,
            latents_npz=latents,
            train_size=entry.train_size,
        )
        found.items.append(item)
    if entries and not found.items:
        _suggest_folder(name, entries[0].key, subset)
    found.notes += _caption_notes(name, entries, subset)
    return found


def _suggest_folder(name: str, key: str, subset: SubsetSettings) -> None:
    """Where no picture is found, look one level up and down.

    Raises:
        UserError: names the folder that has the first one.
    """
    if subset.image_dir is None:
        return
    folder = os.path.normpath(subset.image_dir)
    below = [os.path.join(folder, one) for one in list_folder(folder).folders]
    for place in (*below, os.path.dirname(os.path.abspath(folder))):
        if _Places(place).picture(key) is not None:
            raise UserError(
                f"no picture of {name} is in {subset.image_dir}, but {key} is in {place}",
                f"give {place} as image_dir (--train_data_dir)",
            )


def _caption_notes(name: str, entries: Sequence[Entry], subset: SubsetSettings) -> Iterator[str]:
    bare = [entry.key for entry in entries if not entry.caption and not entry.tags]
    if bare:
        yield f"{name}: {len(bare)} pictures have neither caption nor tags ({some(bare)}), their caption is empty"
    several = [entry.key for entry in entries if entry.several]
    if several and not subset.enable_wildcard:
        yield (
            f"{name}: {len(several)} pictures have several captions, the first is used; enable_wildcard draws one of "
            "them each time"
        )


class _Places:
    """Finds files by the names that metadata give them; every folder is listed once."""

    def __init__(self, folder: str | None) -> None:
        if folder is not None and not os.path.isdir(folder):
            raise UserError(
                f"image_dir {folder} {no_folder(folder)}", "give the folder of the pictures (--train_data_dir)"
            )
        self.folder = folder
        self._known: dict[str, tuple[dict[str, str], set[str]]] = {}

    def where(self) -> str:
        return f" in {self.folder}" if self.folder else "; give their folder as image_dir or --train_data_dir"

    def picture(self, key: str) -> str | None:
        """The file that a key stands for: a path, or a name in the folder with or without its ending."""
        has_folder = os.path.dirname(key) != ""
        if (has_folder or os.path.splitext(key)[1]) and self._holds(key):
            return key
        if self.folder is None and not has_folder:
            return None
        place = os.path.join(self.folder or "", key)
        pictures, files = self._list(os.path.dirname(place))
        name = os.path.basename(place)
        if name in pictures:
            return os.path.join(os.path.dirname(place), pictures[name])
        return place if name in files else None

    def latents(self, key: str, picture: str | None) -> str | None:
        """The file of precomputed latents: beside the picture, or where the picture would be."""
        stem = os.path.splitext(key)[0]
        names = [os.path.splitext(picture)[0]] if picture else []
        names += [stem] if stem != key or os.path.dirname(key) else []
        names += [os.path.join(self.folder, key), os.path.join(self.folder, stem)] if self.folder is not None else []
        return next((f"{name}.npz" for name in names if self._holds(f"{name}.npz")), None)

    def _holds(self, path: str) -> bool:
        return os.path.basename(path) in self._list(os.path.dirname(path))[1]

    def _list(self, folder: str) -> tuple[dict[str, str], set[str]]:
        """(name without ending -> first picture of that name, all files) of a folder."""
        if folder not in self._known:
            try:
                listing = list_folder(folder or os.curdir)
            except OSError:
                self._known[folder] = {}, set()
                return self._known[folder]
            pictures: dict[str, str] = {}
            for name in listing.pictures:
                pictures.setdefault(os.path.splitext(name)[0], name)
            self._known[folder] = pictures, {*listing.pictures, *listing.others}
        return self._known[folder]


def settle(items: Sequence[Item], settings: DatasetSettings) -> Settled:
    """Decide on precomputed latents and buckets, and read the sizes of pictures that are read from their files.

    Raises:
        UserError: latents of an old format, or buckets that contradict the metadata.
    """
    settled = Settled()
    _name_apart(items, settings)
    if items and all(item.train_size for item in items):
        settled.bucket_sizes = sorted({item.train_size for item in items if item.train_size})
        if settings.bucket_no_upscale:
            raise UserError(
                "bucket_no_upscale with metadata that say the training size of every picture",
                "leave bucket_no_upscale out, or take metadata without train_resolution",
            )
        if not settings.enable_bucket:
            settled.notes.append("buckets are on: the metadata say the training size of every picture")
    linked = sum(item.latents_npz is not None for item in items)
    why = _why_not(items, settings, settled) if linked else None
    if linked and why is None:
        for item in items:
            assert item.train_size is not None
            item.size = item.train_size
        settled.notes.append(f"{linked} files of precomputed latents are used")
        return settled
    if why is not None:
        settled.notes.append(f"{linked} files of precomputed latents are not used: {why}")
    pictures = [item for item in items if item.path != item.latents_npz]
    facts = facts_of_paths(item.path for item in pictures)
    for item in items:
        if item.path == item.latents_npz:
            problem = f"{item.key} (no picture, and its latents {item.path} are not used: {why})"
        else:
            problem = _read_size(item, facts[item.path], settings.subsets[item.subset])
        item.latents_npz = None
        if problem is not None:
            settled.broken.append(problem)
            settled.unusable.append(item)
    return settled


def _read_size(item: Item, facts: Facts | OSError, subset: SubsetSettings) -> str | None:
    """Give a picture the size of its file; returns what is broken."""
    try:
        item.size, item.orientation = seen_size(facts, subset)
    except OSError as error:
        return f"{item.path} ({reason(error)})"
    return None


def _name_apart(items: Sequence[Item], settings: DatasetSettings) -> None:
    """Pictures of two metadata files that have the same key get the file's name before it."""
    first: dict[str, int] = {}
    for item in items:
        if first.setdefault(item.key, item.subset) != item.subset:
            item.key = f"{settings.subsets[item.subset].metadata_file}: {item.key}"


def _why_not(items: Sequence[Item], settings: DatasetSettings, settled: Settled) -> str | None:
    """Why precomputed latents cannot be used for this data set, or None."""
    subsets = [settings.subsets[number] for number in sorted({item.subset for item in items})]
    for name in ("color_aug", "random_crop", "conditioning_data_dir"):
        if any(getattr(subset, name) for subset in subsets):
            return f"{name} needs the pictures"
    without = [item.key for item in items if item.latents_npz is None]
    if without:
        return f"{len(without)} pictures have none ({some(without)})"
    if settled.bucket_sizes is None:
        sizeless = [item.key for item in items if item.train_size is None]
        return f"{len(sizeless)} pictures have no train_resolution in the metadata ({some(sizeless)})"
    bad = [text for item in items if (text := _unfit(item, settings.subsets[item.subset]))]
    return some(bad) if bad else None


def _unfit(item: Item, subset: SubsetSettings) -> str | None:
    """What is wrong with one file of latents, or None."""
    path, size = str(item.latents_npz), item.train_size
    assert size is not None
    header = read_header(path)
    if header is None or not {"latents", "original_size", "crop_ltrb"} <= header.shapes.keys():
        return f"{path} is broken or of an older format, make it anew with finetune/prepare_buckets_latents.py"
    shape = (size[1] // 8, size[0] // 8)
    if header.shapes["latents"][1:3] != shape:
        return f"{path} is not of the training size {size[0]}x{size[1]}"
    if subset.flip_aug and header.shapes.get("latents_flipped", ())[1:3] != shape:
        other = f"{os.path.splitext(path)[0]}_flip.npz"
        if os.path.exists(other):
            raise UserError(
                f"{other}: latents in two files are an old format",
                "make them anew with finetune/prepare_buckets_latents.py --flip_aug, or delete the .npz files",
            )
        return f"{path} has no flipped latents"
    if subset.alpha_mask and "alpha_mask" not in header.shapes:
        return f"{path} has no alpha mask"
    known = (header.key or {}).get("source")
    if known and item.path != path and (verdict := judge_source(item.path, known)) not in (VALID, MOVED):
        return f"{path} is older than its picture ({verdict})"
    return None
