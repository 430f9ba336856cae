"""Conditioning pictures beside training pictures, found by their names: what a ControlNet is shown, or loss masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from library.data.index import facts_of_paths
from library.data.listing import list_folder, picture_count
from library.data.picture_folder import reason, seen_size
from library.data.records import DatasetSettings, Item, Size, SubsetSettings
from library.messages import UserError, some
from library.runtime.files import no_folder

# A mask may have another size than its picture, but not another shape.
LARGEST_SHAPE_DIFFERENCE = 0.03


@dataclass(slots=True)
class Added:
    """What adding conditioning pictures gave: notes, and broken files with the items that go with them."""

    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unusable: list[Item] = field(default_factory=list)


def add_conditioning(items: Sequence[Item], settings: DatasetSettings, *, skip_broken: bool = False) -> Added:
    """Link each picture to the one of the same name in its subset's `conditioning_data_dir`, whatever its ending.

    For a ControlNet every picture needs one, none may be left over, and with buckets both have the same size. A
    picture without a mask is trained whole; masks may have another size.

    Args:
        items: pictures of the data set.
        settings: of the data set.
        skip_broken: pictures were left out, so conditioning pictures may be left over.

    Raises:
        UserError: names the folders and pictures that do not fit.
    """
    added = Added()
    paired = settings.kind == "controlnet"
    folders = {subset.conditioning_data_dir: None for subset in settings.subsets if subset.conditioning_data_dir}
    known = {folder: _Folder(folder) for folder in folders}
    missing = []
    for item in items:
        folder = known.get(settings.subsets[item.subset].conditioning_data_dir)
        if folder is None:
            continue
        item.conditioning = folder.find(os.path.basename(item.path))
        if item.conditioning is None:
            missing.append(item.path)
    _tell_missing(missing, list(known.values()), added, paired)
    if not (paired and skip_broken):
        _tell_surplus(list(known.values()), added, paired)
    _check_sizes([item for item in items if item.conditioning is not None], settings, added)
    return added


class _Folder:
    """A folder of conditioning pictures, and which of them are used."""

    def __init__(self, path: str) -> None:
        if not os.path.isdir(path):
            raise UserError(
                f"conditioning_data_dir {path} {no_folder(path)}", "give the folder of the conditioning pictures"
            )
        self.path = path
        listing = list_folder(path)
        if not listing.pictures:
            below = [os.path.join(path, name) for name in listing.folders]
            better = next((folder for folder in below if picture_count(folder)), None)
            raise UserError(
                f"conditioning_data_dir {path} holds no pictures",
                f"give {better}, which does" if better else "give the folder of the conditioning pictures",
            )
        self.names = listing.pictures
        self.used: set[str] = set()
        self._whole = set(self.names)
        self._by_stem: dict[str, str] = {}
        for name in self.names:
            self._by_stem.setdefault(os.path.splitext(name)[0], name)

    def find(self, name: str) -> str | None:
        """The picture of the same name, else of the same name with another ending."""
        found = name if name in self._whole else self._by_stem.get(os.path.splitext(name)[0])
        if found is None:
            return None
        self.used.add(found)
        return os.path.join(self.path, found)


def _tell_missing(missing: Sequence[str], folders: Sequence[_Folder], added: Added, paired: bool) -> None:
    if not missing:
        return
    where = ", ".join(folder.path for folder in folders)
    text = f"{len(missing)} pictures have no picture of the same name in {where} ({some(missing)})"
    if paired:
        raise UserError(text, "add the conditioning pictures, or take these pictures out")
    if not any(folder.used for folder in folders):
        raise UserError(f"no picture has a mask: {text}", "name each mask as its picture")
    added.notes.append(f"{text}: they are trained without a mask")


def _tell_surplus(folders: Sequence[_Folder], added: Added, paired: bool) -> None:
    unused = [os.path.join(folder.path, name) for folder in folders for name in folder.names if name not in folder.used]
    if not unused:
        return
    text = f"{len(unused)} conditioning pictures belong to no training picture ({some(unused)})"
    if paired:
        raise UserError(text, "take them out of the folder, or add the training pictures")
    added.notes.append(f"{text}: they are not used")


def _check_sizes(items: Sequence[Item], settings: DatasetSettings, added: Added) -> None:
    wrong = []
    facts = facts_of_paths(str(item.conditioning) for item in items)
    for item in items:
        try:
            known = facts[str(item.conditioning)]
            size, item.conditioning_orientation = seen_size(known, settings.subsets[item.subset])
        except OSError as error:
            added.broken.append(f"{item.conditioning} ({reason(error)})")
            added.unusable.append(item)
            continue
        if not _fits(size, item, settings):
            wrong.append(f"{item.conditioning} ({size[0]}x{size[1]}, {item.path} is {item.size[0]}x{item.size[1]})")
    if wrong:
        what = "size" if settings.kind == "controlnet" else "shape"
        raise UserError(
            f"{len(wrong)} conditioning pictures have another {what} than their pictures: {some(wrong)}",
            f"resize or redraw them in the {what} of their pictures",
        )


def _fits(size: Size, item: Item, settings: DatasetSettings) -> bool:
    if settings.kind == "controlnet":
        return size == item.size or not settings.enable_bucket
    return abs(size[0] * item.size[1] / (size[1] * item.size[0]) - 1) <= LARGEST_SHAPE_DIFFERENCE


def uses_masks(subset: SubsetSettings, kind: str) -> bool:
    """Whether a subset's pictures may have loss masks."""
    return subset.alpha_mask or (subset.conditioning_data_dir is not None and kind != "controlnet")
