"""DreamBooth folders: sub-folders named `N_name` are subsets with N repeats and `name` as class tokens."""

from __future__ import annotations

import os
from typing import Any

from library.data.listing import Listing, list_folder, picture_count
from library.messages import UserError, log, some
from library.runtime.files import no_folder


def parse_name(name: str) -> tuple[int, str] | None:
    """`10_sks dog` -> (10, "sks dog"), `5` -> (5, ""); None if the name does not start with a number."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return None


def subset_tables(folder: str | None, *, is_reg: bool = False) -> list[dict[str, Any]]:
    """Subset tables of the `N_name` folders in a folder, by name; empty if there is no such folder.

    Sub-folders that give no subset are named in a warning.
    """
    if not folder or not os.path.isdir(folder):
        return []
    tables, skipped = [], []
    for name in list_folder(folder).folders:
        parsed = parse_name(name)
        if parsed is None or parsed[0] < 1:
            skipped.append(name)
            continue
        tables.append(
            {
                "image_dir": os.path.join(folder, name),
                "num_repeats": parsed[0],
                "is_reg": is_reg,
                "class_tokens": parsed[1],
            }
        )
    if skipped and tables:
        log.warning("not used, their names do not start with a number from 1 up: %s", _joined(folder, skipped))
    return tables


def required_tables(folder: str, option: str, *, is_reg: bool = False) -> list[dict[str, Any]]:
    """The same for a folder that the user gave: never empty.

    A folder that holds pictures itself and no `N_name` folders becomes one subset, used once, with a note.

    Raises:
        UserError: nothing to train on there; says which path or name would work.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option} {folder} {no_folder(folder)}", "give the folder that holds the N_name folders")
    listing = list_folder(folder)
    tables = subset_tables(folder, is_reg=is_reg)
    if tables:
        if listing.pictures:
            log.warning(
                "%d pictures directly in %s are not used: move them into a folder named N_name",
                len(listing.pictures),
                folder,
            )
        return tables
    if listing.pictures:
        return _flat(folder, option, listing, is_reg)
    raise _advice(folder, option, listing)


def _flat(folder: str, option: str, listing: Listing, is_reg: bool) -> list[dict[str, Any]]:
    path = os.path.abspath(folder)
    parsed = parse_name(os.path.basename(path))
    if parsed and parsed[0] >= 1:
        raise UserError(
            f"{option} {folder} is itself a folder named N_name",
            f"give the folder above it: {option} {os.path.dirname(path)}",
        )
    meant = _named_below(folder, listing.folders)
    if meant is not None:
        log.warning("%s has folders named N_name, which are not used: is %s %s meant?", meant, option, meant)
    log.warning(
        "%s %s holds %d pictures and no folders named N_name: each picture is used once per epoch, captions come from "
        "caption files only; for repeats and class tokens move the pictures into a folder such as %s",
        option,
        folder,
        len(listing.pictures),
        os.path.join(folder, "10_name"),
    )
    return [{"image_dir": folder, "num_repeats": 1, "is_reg": is_reg}]


def _named_below(folder: str, names: list[str], levels: int = 2) -> str | None:
    """The first folder up to two levels down that holds `N_name` folders, the nearer level first."""
    below = [os.path.join(folder, name) for name in names]
    found = next((path for path in below if _has_named_folders(path)), None)
    if found is not None or levels == 1:
        return found
    deeper = (_named_below(path, _folders_in(path), levels - 1) for path in below)
    return next((path for path in deeper if path is not None), None)


def _advice(folder: str, option: str, listing: Listing) -> UserError:
    """What to do about a folder without pictures and without `N_name` folders."""
    meant = _named_below(folder, listing.folders)
    if meant is not None:
        return UserError(f"{option} {folder} has no folders named N_name", f"they are further down: {option} {meant}")
    unnumbered = [name for name in listing.folders if picture_count(os.path.join(folder, name))]
    if unnumbered:
        old, new = os.path.join(folder, unnumbered[0]), os.path.join(folder, f"10_{unnumbered[0]}")
        return UserError(
            f"{option} {folder} has no folders named N_name (number of repeats, then a name)",
            f"rename {old} to {new} to use its pictures 10 times per epoch",
        )
    return UserError(f"{option} {folder} holds no pictures", "put pictures into a sub-folder such as 10_name")


def _has_named_folders(folder: str) -> bool:
    return any(parsed and parsed[0] >= 1 for parsed in map(parse_name, _folders_in(folder)))


def _folders_in(folder: str) -> list[str]:
    try:
        return list_folder(folder).folders
    except OSError:
        return []


def _joined(folder: str, names: list[str]) -> str:
    return some([os.path.join(folder, name) for name in names])
