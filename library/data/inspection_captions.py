"""What the data-set report says of captions: their parts, their lengths in tokens, files that lack a partner."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from library.data.captions import fixed, with_affixes
from library.data.dataset import Dataset
from library.data.group import DatasetGroup
from library.data.listing import list_folder
from library.data.picture_folder import caption_finder, caption_suffix
from library.data.records import Item, ScanResult, SubsetSettings

CountTokens = Callable[[Sequence[str]], list[int]]
# Tokens that one, two and three chunks of a text encoder hold.
CHUNK_ENDS = (75, 150, 225)
# Captions named as the longest.
LONGEST = 20


def caption_facts(group: DatasetGroup, scans: Sequence[ScanResult], count_tokens: CountTokens | None) -> dict[str, Any]:
    """Parts, lengths and files of the captions of all data sets; `count_tokens` as in `inspection.inspect`."""
    tags: Counter[str] = Counter()
    for scan in scans:
        for counts in scan.tag_frequency.values():
            tags.update(counts)
    missing, by_class, orphans = _caption_files(group)
    items = [(dataset, item) for dataset in group.datasets for item in dataset.items]
    empty = [item.path for dataset, item in items if not dataset.fixed_caption(item).strip()]
    return {
        "tags": dict(sorted(tags.items(), key=lambda pair: (-pair[1], pair[0]))),
        "missing": missing,
        "by_class_tokens": by_class,
        "orphans": orphans,
        "empty": empty,
        "tokens": None if count_tokens is None else _tokens(items, count_tokens),
    }


def _caption_files(group: DatasetGroup) -> tuple[list[str], list[str], list[str]]:
    """Pictures that lack a caption file; those that are meant to (class tokens and no caption file in the folder);
    and caption files without a picture.
    """
    missing: list[str] = []
    by_class: list[str] = []
    orphans: list[str] = []
    seen: set[tuple[str, str]] = set()
    for subset in (subset for dataset in group.with_validation for subset in dataset.subsets):
        if subset.metadata_file or subset.image_dir is None or (subset.image_dir, subset.caption_extension) in seen:
            continue
        seen.add((subset.image_dir, subset.caption_extension))
        try:
            without, alone, none_there = _caption_files_of(subset)
        except OSError:  # said in the notes of the scan
            continue
        (by_class if none_there and subset.class_tokens else missing).extend(without)
        orphans += alone
    return missing, by_class, orphans


def _caption_files_of(subset: SubsetSettings) -> tuple[list[str], list[str], bool]:
    folder = str(subset.image_dir)
    listing = list_folder(folder)
    find = caption_finder(subset, listing)
    partners = {name: find(name) for name in listing.pictures}
    suffix = os.path.normcase(caption_suffix(subset))
    texts = {name for name in listing.others if os.path.normcase(name).endswith(suffix)}
    without = [os.path.join(folder, name) for name, text in partners.items() if text is None]
    alone = [os.path.join(folder, name) for name in sorted(texts - {*partners.values()})]
    return without, alone, not texts


def _tokens(items: Sequence[tuple[Dataset, Item]], count_tokens: CountTokens) -> dict[str, Any]:
    """Tokens of the captions as they are without chance, a picture each once; of several captions the longest."""
    choices = [_variants(dataset, item) for dataset, item in items]
    limits = [dataset.settings.max_token_length or CHUNK_ENDS[0] for dataset, _ in items]
    unique = list(dict.fromkeys(text for texts in choices for text in texts))
    counted = dict(zip(unique, count_tokens(unique), strict=True))
    texts = [max(variants, key=counted.__getitem__) for variants in choices]
    lengths = [counted[text] for text in texts]
    ranked = sorted(range(len(texts)), key=lambda i: -lengths[i])[:LONGEST]
    return {
        "limits": sorted(set(limits)),
        "cut": sum(length > limit for length, limit in zip(lengths, limits, strict=True)),
        "over": {str(end): sum(length > end for length in lengths) for end in CHUNK_ENDS},
        "lengths": {str(length): count for length, count in sorted(Counter(lengths).items())},
        "longest": [
            {"path": items[i][1].path, "tokens": lengths[i], "cut": lengths[i] > limits[i], "caption": texts[i]}
            for i in ranked
        ],
    }


def _variants(dataset: Dataset, item: Item) -> list[str]:
    """The captions of which one is chosen each time; elsewhere the one that there is."""
    subset = dataset.subsets[item.subset]
    if not subset.enable_wildcard or "\n" not in item.caption:
        return [dataset.fixed_caption(item)]
    lines = with_affixes(item.caption, subset).split("\n")
    return [fixed(line, dataclasses.replace(subset, caption_prefix=None, caption_suffix=None)) for line in lines]
