"""Finds a data set's pictures, with captions and sizes, and says what is wrong or odd there.

Each subset is read by its kind: a folder (`picture_folder.py`) or a metadata file (`metadata_source.py`); conditioning
pictures are put beside (`pairs.py`). Regularisation pictures are balanced against the training pictures, and
validation pictures are set apart.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from library.data.captions import tags_of
from library.data.listing import collector_paused
from library.data.metadata_source import read_metadata_subset, settle
from library.data.pairs import add_conditioning
from library.data.picture_check import UnreadableFiles, unreadable
from library.data.picture_folder import read_folder
from library.data.records import DatasetSettings, Found, Item, ScanResult, SubsetSettings
from library.data.validation import hold_out
from library.messages import UserError, some

# The largest picture that a JPEG file can hold.
LARGEST_SIDE = 65535
# An epoch's plan names every repeat, so it must fit into memory.
MOST_REPEATS = 1_000_000


def scan_all(
    datasets: Sequence[DatasetSettings],
    *,
    seed: int = 0,
    skip_broken: bool = False,
    check_pixels: bool | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[ScanResult]:
    """`scan` of several data sets; files that cannot be used are named together.

    Raises:
        UserError: see `scan`.
    """
    results, broken = [], []
    for settings in datasets:
        try:
            results.append(scan(settings, seed=seed, skip_broken=skip_broken, check_pixels=check_pixels, share=share))
        except UnreadableFiles as error:
            broken += error.files
    if broken:
        raise UnreadableFiles.of(list(dict.fromkeys(broken)))
    return results


@collector_paused()
def scan(
    settings: DatasetSettings,
    *,
    seed: int = 0,
    skip_broken: bool = False,
    check_pixels: bool | None = None,
    share: tuple[int, int] = (0, 1),
) -> ScanResult:
    """The pictures of one data set.

    Args:
        settings: resolved settings; with a resolution, unless metadata say the size of every picture.
        seed: decides which pictures are held out where `validation_seed` is not set.
        skip_broken: leave out pictures that cannot be read instead of stopping.
        check_pixels: decode every picture once; as `skip_broken` when left out.
        share: (number of this process, how many there are): the pictures that stop the run are decoded in turns, so
            that each process takes its part of the time. Where they are left out, all must know all of them.

    Raises:
        UserError: no resolution, a setting out of range, or pictures, captions or metadata that cannot be used; it
            names them.
    """
    _check(settings)
    check_pixels = skip_broken if check_pixels is None else check_pixels
    result = ScanResult(image_counts=[0] * len(settings.subsets))
    found = _read_subsets(settings, result)
    broken = [text for one in found.values() for text in one.broken]
    if settings.kind == "finetuning":
        broken += _settle(settings, found, result)
    elif settings.resolution is None:
        raise _no_resolution()
    broken += _add_conditioning(settings, found, result, skip_broken=skip_broken)
    broken += _check_pixels(found, (0, 1) if skip_broken else share) if check_pixels else []
    if broken and not skip_broken:
        raise UnreadableFiles.of(broken)
    result.broken = broken
    if broken:
        result.notes.append(f"{len(broken)} pictures are left out, they cannot be read: {some(broken)}")
    _skip_small(settings, found, result)
    _deal_out(settings, found, result, seed)
    result.notes += _size_notes(result.items, settings)
    return result


def _read_subsets(settings: DatasetSettings, result: ScanResult) -> dict[int, Found]:
    """What each usable subset gives, by its number."""
    found: dict[int, Found] = {}
    seen: dict[str, str] = {}
    for index, subset in enumerate(settings.subsets):
        note = _unusable(subset, seen)
        if note is None and subset.is_reg and settings.is_validation:
            note = f"{subset.image_dir} is left out: regularisation pictures are not for validation"
        if note:
            result.notes.append(note)
            continue
        one = read_metadata_subset(subset, index) if subset.metadata_file else _folder(subset, index)
        result.notes += one.notes
        if one.items or not subset.metadata_file:
            _count_tags(result.tag_frequency.setdefault(source_name(subset), {}), one.tag_texts)
        found[index] = one
    return found


def _folder(subset: SubsetSettings, index: int) -> Found:
    found = read_folder(subset, index)
    found.tag_texts = [item.caption for item in found.items]
    return found


def _settle(settings: DatasetSettings, found: dict[int, Found], result: ScanResult) -> list[str]:
    """Sizes, buckets and precomputed latents of metadata; returns what is broken."""
    items = [item for one in found.values() for item in one.items]
    settled = settle(items, settings)
    if settled.bucket_sizes is None and settings.resolution is None:
        raise _no_resolution()
    result.notes += settled.notes
    result.bucket_sizes = settled.bucket_sizes
    _leave_out(found, settled.unusable)
    return settled.broken


def _add_conditioning(
    settings: DatasetSettings, found: dict[int, Found], result: ScanResult, *, skip_broken: bool
) -> list[str]:
    items = [item for one in found.values() for item in one.items]
    if not any(subset.conditioning_data_dir for subset in settings.subsets):
        return []
    added = add_conditioning(items, settings, skip_broken=skip_broken)
    result.notes += added.notes
    _leave_out(found, added.unusable)
    return added.broken


def _check_pixels(found: dict[int, Found], share: tuple[int, int]) -> list[str]:
    """Decode every picture that is read from its file, and its conditioning picture; returns what is broken."""
    items = [item for one in found.values() for item in one.items]
    pictures = [item.path for item in items if item.latents_npz is None]
    pictures += [item.conditioning for item in items if item.conditioning is not None]
    bad = unreadable(pictures[share[0] :: share[1]])
    _leave_out(found, [item for item in items if item.path in bad or item.conditioning in bad])
    return list(bad.values())


def _leave_out(found: dict[int, Found], unusable: Iterable[Item]) -> None:
    gone = {id(item) for item in unusable}
    for one in found.values() if gone else ():
        one.items = [item for item in one.items if id(item) not in gone]


def _skip_small(settings: DatasetSettings, found: dict[int, Found], result: ScanResult) -> None:
    """Leave out the pictures that `skip_image_resolution` says."""
    if settings.skip_image_resolution is None:
        return
    width, height = settings.skip_image_resolution
    items = [item for one in found.values() for item in one.items]
    small = [item for item in items if item.size[0] * item.size[1] <= width * height]
    if small:
        _leave_out(found, small)
        names = some([item.path for item in small])
        result.notes.append(f"{len(small)} pictures of at most {width}x{height} are left out ({names})")


def _deal_out(settings: DatasetSettings, found: dict[int, Found], result: ScanResult, seed: int) -> None:
    """Share the pictures out to training, regularisation and validation."""
    regular: list[Item] = []
    regularisation: list[Item] = []
    for index, one in found.items():
        items = one.items
        if settings.subsets[index].is_reg:
            regularisation += items
        else:
            items, held_out = hold_out(items, settings, seed)
            regular += items
            result.validation += held_out
        result.image_counts[index] = len(items)
    result.num_train_images = sum(item.repeats for item in regular)
    result.num_reg_images = sum(item.repeats for item in regularisation)
    if result.num_train_images < result.num_reg_images:
        result.notes.append(
            f"{result.num_reg_images} regularisation pictures for {result.num_train_images} training pictures "
            "(repeats counted): the last ones are not used"
        )
    result.items = regular + balance(regularisation, result.num_train_images)
    if result.validation:
        result.notes.append(f"{len(result.validation)} pictures are held out for validation")


def require_pictures(datasets: Sequence[DatasetSettings], scans: Sequence[ScanResult]) -> None:
    """Refuse to go on when no data set has a picture.

    Raises:
        UserError: names the folders that were looked at, with what was odd there.
    """
    if any(result.items for result in scans):
        return
    notes = [note for result in scans for note in result.notes]
    if any(result.validation for result in scans):
        raise UserError(
            "all pictures are held out for validation", "lower validation_split, or add a data set to train on"
        )
    folders = [subset.source for one in datasets for subset in one.subsets]
    if not folders:
        raise UserError("no pictures found", "add subsets with an image_dir")
    why = f" ({'; '.join(notes[:5])})" if notes else ""
    raise UserError(f"no pictures found in {some(folders)}{why}", "correct the path, or put pictures there")


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
    if settings.resolution is not None and not all(1 <= side <= LARGEST_SIDE for side in settings.resolution):
        width, height = settings.resolution
        raise UserError(f"resolution is {width}x{height}", f"its sides must lie between 1 and {LARGEST_SIDE} pixels")
    for subset in settings.subsets:
        if subset.num_repeats > MOST_REPEATS:
            raise UserError(f"num_repeats of {subset.source} is {subset.num_repeats}", f"give {MOST_REPEATS} at most")
        if not subset.caption_separator:
            raise UserError("caption_separator is empty", "give the text between the parts of a caption, such as ,")
        if subset.face_crop_aug_range is not None and not subset.face_crop_aug_range[0] > 0:
            shown = ",".join(str(number) for number in subset.face_crop_aug_range)
            raise UserError(f"face_crop_aug_range is {shown}", "give two numbers above 0, such as 1.0,3.0")
    if settings.batch_size < 1:
        raise UserError(f"batch_size is {settings.batch_size}", "it must be 1 or more")
    for subset in settings.subsets if settings.kind == "controlnet" else ():
        for name in ("random_crop", "face_crop_aug_range"):
            if getattr(subset, name):
                raise UserError(
                    f"{name} with conditioning pictures ({subset.image_dir})",
                    "leave it out: the conditioning picture would not be cut at the same place",
                )


def _no_resolution() -> UserError:
    return UserError(
        "no training resolution is given", "set --resolution, or resolution in the data-set file, such as 512"
    )


def _unusable(subset: SubsetSettings, seen: dict[str, str]) -> str | None:
    """Why a subset is left out, or None; remembers its folder or metadata file."""
    source = subset.source
    if subset.num_repeats < 1:
        return f"{source} is left out: num_repeats is {subset.num_repeats}"
    path = os.path.normcase(os.path.realpath(source))
    if path in seen:
        what = "file" if subset.metadata_file else "folder"
        return f"{source} is left out: the same {what} is used before as {seen[path]}"
    if not subset.metadata_file and not os.path.isdir(source):
        what = "it is no folder" if os.path.exists(source) else "it does not exist"
        return f"{source} is left out: {what}"
    seen[path] = source
    return None


def _count_tags(table: dict[str, int], texts: Iterable[str]) -> None:
    for text, times in Counter(texts).items():  # many pictures have the caption of their folder
        for tag in tags_of(text):
            table[tag] = table.get(tag, 0) + times


def source_name(subset: SubsetSettings) -> str:
    """Last part of a subset's metadata file or folder, also where it ends in a slash."""
    return os.path.basename(os.path.normpath(subset.source))


def _size_notes(items: Iterable[Item], settings: DatasetSettings) -> list[str]:
    if settings.bucket_no_upscale or settings.resolution is None:
        return []
    width, height = settings.resolution
    small = [item.path for item in items if item.size[0] * item.size[1] * 4 < width * height and not item.is_reg]
    if not small:
        return []
    return [f"{len(small)} pictures are enlarged more than twice to {width}x{height} ({some(small)})"]
