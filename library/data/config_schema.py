"""What a data-set file may say: every key, where it may stand, its type; and the check that lists all problems.

Keys, levels and types are those of sd-scripts 0.7.0 with the keys that its later versions added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.options.registries import nearest

Path = tuple[str | int, ...]
DREAMBOOTH, FINETUNING, CONTROLNET = "dreambooth", "finetuning", "controlnet"
RESIZE_METHODS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """What kinds of data sets and which settings a script accepts.

    Attributes:
        dreambooth: folders of pictures with caption files.
        finetuning: metadata files.
        controlnet: folders with conditioning pictures.
        dropout: the caption dropout settings.
        masks: loss masks from a folder (`conditioning_data_dir`) for folders of pictures and metadata files.
    """

    dreambooth: bool = True
    finetuning: bool = False
    controlnet: bool = False
    dropout: bool = True
    masks: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        flags = {DREAMBOOTH: self.dreambooth, FINETUNING: self.finetuning, CONTROLNET: self.controlnet}
        return tuple(kind for kind, given in flags.items() if given)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a data-set file.

    Attributes:
        path: keys and positions from the top of the file to the entry.
        text: what was found and what is allowed.
    """

    path: Path
    text: str

    @property
    def place(self) -> str:
        """The path as users read it: `datasets[0].subsets[1].flip_aug`."""
        text = ""
        for step in self.path:
            text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
        return text

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.path else self.text


@dataclass(frozen=True, slots=True)
class Rule:
    """A type that a value may have: its name for messages and the test."""

    name: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int)  # true and false count as 1 and 0, as in the original


def _is_pair(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(item, kind) for item in value)


BOOL = Rule("true or false", lambda value: isinstance(value, bool))
INT = Rule("a whole number", _is_integer)
NUMBER = Rule("a number", lambda value: isinstance(value, (int, float)))
# a zero byte ends names where the system reads them
TEXT = Rule("a text in quotes", lambda value: isinstance(value, str) and "\0" not in value)
TABLE = Rule("a table", lambda value: isinstance(value, Mapping))
RESOLUTION = Rule(
    "a whole number or a list of two, [width, height]", lambda value: _is_integer(value) or _is_pair(value, int)
)
FLOAT_PAIR = Rule("a list of two numbers with decimal points, such as [1.0, 3.0]", lambda value: _is_pair(value, float))
RESIZE = Rule("one of " + ", ".join(RESIZE_METHODS), lambda value: isinstance(value, str) and value in RESIZE_METHODS)

DATASET_KEYS: Mapping[str, Rule] = {
    "batch_size": INT,
    "resolution": RESOLUTION,
    "enable_bucket": BOOL,
    "min_bucket_reso": INT,
    "max_bucket_reso": INT,
    "bucket_reso_steps": INT,
    "bucket_no_upscale": BOOL,
    "network_multiplier": NUMBER,
    "skip_image_resolution": RESOLUTION,
    "validation_split": NUMBER,
    "validation_seed": INT,
}
# Keys of [[datasets]] alone.
DATASET_ONLY_KEYS: Mapping[str, Rule] = {"is_validation": BOOL}
SUBSET_KEYS: Mapping[str, Rule] = {
    "num_repeats": INT,
    "shuffle_caption": BOOL,
    "caption_separator": TEXT,
    "keep_tokens": INT,
    "keep_tokens_separator": TEXT,
    "secondary_separator": TEXT,
    "enable_wildcard": BOOL,
    "caption_prefix": TEXT,
    "caption_suffix": TEXT,
    "color_aug": BOOL,
    "flip_aug": BOOL,
    "face_crop_aug_range": FLOAT_PAIR,
    "random_crop": BOOL,
    "token_warmup_min": INT,
    "token_warmup_step": NUMBER,
    "resize_interpolation": RESIZE,
    "ignore_exif_orientation": BOOL,
    "custom_attributes": TABLE,
}
DROPOUT_KEYS: Mapping[str, Rule] = {
    "caption_dropout_rate": NUMBER,
    "caption_dropout_every_n_epochs": INT,
    "caption_tag_dropout_rate": NUMBER,
}
# Keys of one kind that may also stand in the tables above the subset.
SHARED_KEYS: Mapping[str, Mapping[str, Rule]] = {
    DREAMBOOTH: {"class_tokens": TEXT, "caption_extension": TEXT, "cache_info": BOOL},
    FINETUNING: {},
    CONTROLNET: {"caption_extension": TEXT, "cache_info": BOOL},
}
OWN_KEYS: Mapping[str, Mapping[str, Rule]] = {
    DREAMBOOTH: {"image_dir": TEXT, "is_reg": BOOL, "alpha_mask": BOOL},
    FINETUNING: {"image_dir": TEXT, "metadata_file": TEXT, "alpha_mask": BOOL},
    CONTROLNET: {"image_dir": TEXT, "conditioning_data_dir": TEXT},
}
REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = {
    DREAMBOOTH: ("image_dir",),
    FINETUNING: ("metadata_file",),
    CONTROLNET: ("image_dir", "conditioning_data_dir"),
}
MASK_KEYS: Mapping[str, Rule] = {"conditioning_data_dir": TEXT}
# Options that are no keys, and what to write instead.
COMMAND_LINE_NAMES: Mapping[str, str] = {
    "train_batch_size": "the key is batch_size",
    "dataset_repeats": "the key is num_repeats",
    "caption_extention": "the key is caption_extension",
    "train_data_dir": "name each folder by image_dir in a [[datasets.subsets]] table",
    "reg_data_dir": "name each folder by image_dir in a [[datasets.subsets]] table, with is_reg = true",
    "in_json": "the key is metadata_file",
    "max_token_length": "give it as option --max_token_length",
    "prior_loss_weight": "give it as option --prior_loss_weight",
    "debug_dataset": "give it as option --debug_dataset",
    "cache_latents": "give it as option --cache_latents",
    "seed": "give it as option --seed",
}


def shared_keys(support: Support, kinds: Iterable[str]) -> dict[str, Rule]:
    """Subset keys that may also stand in `[general]` and `[[datasets]]`."""
    keys = {**SUBSET_KEYS, **(DROPOUT_KEYS if support.dropout else {})}
    for kind in kinds:
        keys |= SHARED_KEYS[kind]
    return keys


def own_keys(support: Support, kind: str) -> dict[str, Rule]:
    """Keys that stand in a subset of this kind alone."""
    return {**OWN_KEYS[kind], **(MASK_KEYS if support.masks and kind != CONTROLNET else {})}


def kind_of(subsets: Iterable[Mapping[str, Any]], support: Support) -> str | None:
    """Kind of a data set with these subset tables; None where two kinds are mixed.

    A data set without subsets is of the script's first kind.
    """
    if len(support.kinds) == 1:
        return support.kinds[0]
    found = set()
    for subset in subsets:
        if "metadata_file" in subset:
            found.add(FINETUNING)
        elif "conditioning_data_dir" in subset and support.controlnet:
            found.add(CONTROLNET)
        else:
            found.add(DREAMBOOTH)
    if len(found) > 1:
        return None
    return found.pop() if found else support.kinds[0]


def check(config: Any, support: Support) -> list[Problem]:
    """Everything that is wrong with the contents of a data-set file, in the file's order; empty if nothing is."""
    return list(_check_top(config, support))


def _check_top(config: Any, support: Support) -> Iterator[Problem]:
    if not isinstance(config, Mapping):
        yield Problem((), f"the file holds {_shown(config)} instead of tables")
        return
    for key, value in config.items():
        if key == "general":
            keys = {**DATASET_KEYS, **shared_keys(support, support.kinds)}
            yield from _check_table((key,), value, keys, support)
        elif key == "datasets":
            yield from _check_list((key,), value, lambda path, entry: _check_dataset(path, entry, support))
        else:
            yield Problem((key,), _unknown(key, {"general": TABLE, "datasets": TABLE}, support, "the top of the file"))


def _check_dataset(path: Path, table: Any, support: Support) -> Iterator[Problem]:
    if not isinstance(table, Mapping):
        yield Problem(path, f"found {_shown(table)}, must be a table")
        return
    entries = table.get("subsets", [])
    tables = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, (list, tuple)) else []
    kind = kind_of(tables, support)
    if kind is None:
        yield Problem(path, "subsets with and without metadata_file are mixed: put them into two [[datasets]]")
        return
    own = {key: value for key, value in table.items() if key != "subsets"}
    keys = {**DATASET_KEYS, **DATASET_ONLY_KEYS, **shared_keys(support, [kind])}
    yield from _check_table(path, own, keys, support)
    if "subsets" in table:
        yield from _check_list(
            (*path, "subsets"), entries, lambda place, entry: _check_subset(place, entry, kind, support)
        )


def _check_subset(path: Path, table: Any, kind: str, support: Support) -> Iterator[Problem]:
    yield from _check_table(path, table, {**shared_keys(support, [kind]), **own_keys(support, kind)}, support)
    if isinstance(table, Mapping):
        for key in REQUIRED_KEYS[kind]:
            if key not in table:
                yield Problem((*path, key), "missing, this subset needs it")


def _check_list(path: Path, value: Any, check_entry: Callable[[Path, Any], Iterator[Problem]]) -> Iterator[Problem]:
    if not isinstance(value, (list, tuple)):
        header = ".".join(str(step) for step in path if isinstance(step, str))
        yield Problem(path, f"found {_shown(value)}, must be a list of tables; in TOML the header is [[{header}]]")
        return
    for index, entry in enumerate(value):
        yield from check_entry((*path, index), entry)


def _check_table(path: Path, table: Any, keys: Mapping[str, Rule], support: Support) -> Iterator[Problem]:
    if not isinstance(table, Mapping):
        yield Problem(path, f"found {_shown(table)}, must be a table")
        return
    for key, value in table.items():
        rule = keys.get(key)
        if rule is None:
            yield Problem((*path, key), _unknown(key, keys, support, _table_name(path)))
        elif not rule.accepts(value):
            yield Problem((*path, key), f"found {_shown(value)}, must be {rule.name}")


def _table_name(path: Path) -> str:
    names = ".".join(step for step in path if isinstance(step, str))
    return f"[{names}]" if names == "general" else f"[[{names}]]"


def _unknown(key: str, keys: Mapping[str, Rule], support: Support, place: str) -> str:
    """Why a key is refused here, and which one was probably meant."""
    if key in COMMAND_LINE_NAMES:
        return f"is no key of a data-set file: {COMMAND_LINE_NAMES[key]}"
    if key in DATASET_ONLY_KEYS:
        return f"is not allowed in {place}: put it into a [[datasets]] table"
    if key in DATASET_KEYS:
        return f"is not allowed in {place}: put it into [[datasets]] or [general]"
    subset_only = {name for kind in OWN_KEYS.values() for name in kind}
    if key in MASK_KEYS and not support.masks and CONTROLNET not in support.kinds:
        return f"is not allowed in {place}: it gives masks of the loss, which need --masked_loss"
    if key in subset_only and any(key in own_keys(support, kind) for kind in support.kinds) and key not in keys:
        return f"is not allowed in {place}: it belongs into a [[datasets.subsets]] table"
    if key in SUBSET_KEYS:
        return f"is not allowed in {place}: put it into [general], [[datasets]] or [[datasets.subsets]]"
    if key in {*DROPOUT_KEYS, *subset_only, *(name for kind in SHARED_KEYS.values() for name in kind)}:
        return f"is not allowed in {place}: this script or this kind of data set does not use it"
    similar = nearest(key, {*keys, *_meant(place, support)}, 1)
    return f"unknown key in {place}" + (f", did you mean {similar[0]}?" if similar else "")


def _meant(place: str, support: Support) -> set[str]:
    """Keys that are not looked up as others are, or make a data set one of another kind, and may be misspelled."""
    if place == "[[datasets]]":
        return {"subsets"}
    if place == "[[datasets.subsets]]":
        return {key for kind in support.kinds for key in own_keys(support, kind)}
    return set()


def _shown(value: Any) -> str:
    """A value as the file has it, short."""
    if isinstance(value, Mapping):
        return "a table"
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
