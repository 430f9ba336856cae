"""Collects caption and tag files in a metadata file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from library.data.listing import with_dot
from library.data.metadata_json import Metadata, read_metadata, write_metadata
from library.data.picture_search import find_pictures
from library.data.plain_text import read_text
from library.messages import UserError, log, progress, some
from library.options.data_tools import TextMergeConfig


def merge_files(config: TextMergeConfig, member: str) -> None:
    """Put the text file of every picture into the metadata file.

    Args:
        config: which pictures, texts and files.
        member: what the text becomes in an entry: `caption` or `tags`.

    Raises:
        UserError: options that contradict each other, a folder or file that cannot be read or written.
    """
    if config.recursive and not config.full_path:
        raise UserError("--recursive without --full_path", "add --full_path: in several folders names may come twice")
    pictures = find_pictures(config.train_data_dir, recursive=config.recursive)
    log.info("%d pictures in %s", len(pictures), config.train_data_dir)
    metadata = _start(config)
    suffix = with_dot(config.caption_extension)
    missing = merge_texts(metadata, pictures, member, suffix, full_path=config.full_path, debug=config.debug)
    if missing:
        text = "%d pictures have no %s file, their %s stays as it was: %s"
        log.warning(text, len(missing), suffix, member, some(missing))
    write_metadata(config.out_json, metadata)
    log.info("%s: %d entries, %d texts put in", config.out_json, len(metadata), len(pictures) - len(missing))


def _start(config: TextMergeConfig) -> Metadata:
    if config.in_json:
        log.info("entries of %s are taken over", config.in_json)
        return read_metadata(config.in_json)
    if os.path.isfile(config.out_json):
        log.info("entries of %s are kept, texts of pictures that are found replace theirs", config.out_json)
        return read_metadata(config.out_json)
    log.info("new metadata file %s", config.out_json)
    return {}


def merge_texts(
    metadata: Metadata, pictures: Sequence[str], member: str, suffix: str, *, full_path: bool, debug: bool = False
) -> list[str]:
    """Put the texts beside pictures into the entries of a metadata file, in place.

    Args:
        metadata: picture -> members; entries that are not there yet are appended.
        pictures: paths.
        member: `caption` or `tags`.
        suffix: ending of the text files, with its dot.
        full_path: name entries by the picture's path instead of its file name without ending.
        debug: show every text.

    Returns:
        pictures without a text file.

    Raises:
        UserError: a text file that cannot be read.
    """
    keys = [picture if full_path else Path(picture).stem for picture in pictures]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        log.warning("pictures that differ in their ending alone share an entry: %s", some(twice))
    missing = []
    for key, picture in progress(list(zip(keys, pictures, strict=True)), "texts"):
        entry = metadata.setdefault(key, {})
        try:
            entry[member] = read_text(os.path.splitext(picture)[0] + suffix).strip()
        except FileNotFoundError:
            missing.append(picture)
            continue
        if debug:
            log.info("%s: %s", key, entry[member])
    return missing
