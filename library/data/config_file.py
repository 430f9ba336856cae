"""Reading a data-set file, TOML or JSON, and finding in which line of it an entry stands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toml

from library.data.config_schema import Problem
from library.messages import UserError
from library.runtime.files import no_file

# Options that only a training configuration sets.
TRAINING_KEYS = (
    "pretrained_model_name_or_path",
    "output_dir",
    "output_name",
    "network_module",
    "learning_rate",
    "unet_lr",
    "optimizer_type",
    "lr_scheduler",
    "max_train_steps",
    "max_train_epochs",
    "mixed_precision",
    "save_every_n_epochs",
    "train_data_dir",
    "dataset_config",
)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a data-set file.

    Args:
        path: ends in `.toml` or `.json`, in either case of letters; UTF-8, with or without a byte order mark.

    Raises:
        UserError: missing, of another kind, not UTF-8, not well formed, or a training configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--dataset_config {path} {no_file(path)}", "give the path of a .toml or .json file")
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path} has the ending {suffix or '(none)'}", "it must be .toml or .json")
    text = _read_text(path)
    try:
        config = toml.loads(text) if suffix == ".toml" else json.loads(text)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:  # toml leaks its own slips
        raise UserError(f"{path} is no valid {suffix[1:].upper()}: {error}", _syntax_remedy(text, suffix)) from error
    _refuse_training_file(path, config)
    return config


def refusal(path: str | os.PathLike[str], problems: Sequence[Problem]) -> UserError:
    """The error that lists all problems of a data-set file, one line each."""
    lines = _line_numbers(Path(path))
    texts = []
    for problem in problems:
        number = lines.get(problem.path) or lines.get(problem.path[:-1])
        texts.append(f"line {number}: {problem}" if number else str(problem))
    if len(texts) == 1:
        return UserError(f"{path}: {texts[0]}")
    return UserError(f"{path} has {len(texts)} problems", details=texts)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "check the file and its permissions") from error
    if "\0" in text:
        raise UserError(f"{path} holds zero bytes, it is no UTF-8 text", "save it as UTF-8")
    return text


def _syntax_remedy(text: str, suffix: str) -> str:
    if suffix == ".toml" and re.search(r'=\s*"[^"\n]*\\', text):
        return "in TOML a backslash in \"...\" starts an escape: write paths with / or in '...'"
    return "mend the file"


def _refuse_training_file(path: Path, config: Any) -> None:
    if not isinstance(config, Mapping) or "datasets" in config:
        return
    tables = [config, *(value for key, value in config.items() if isinstance(value, Mapping) and key != "general")]
    found = [key for key in TRAINING_KEYS if any(key in table for table in tables)]
    if found:
        raise UserError(
            f"{path} is a training configuration (it sets {', '.join(found[:3])}), not a data-set file",
            "give it as --config_file; --dataset_config takes a file with [[datasets]] tables",
        )


_HEADER = re.compile(r"^\s*(\[\[?)\s*([\w.\s\"'-]+?)\s*\]\]?")
_KEY = re.compile(r"^\s*[\"']?([\w-]+)[\"']?\s*=")


def _line_numbers(path: Path) -> dict[tuple[str | int, ...], int]:
    """Entry -> line, for TOML files written with headers; entries of inline tables are not found."""
    if path.suffix.lower() != ".toml":
        return {}
    numbers: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if header := _HEADER.match(line):
            names = [name.strip(" \"'") for name in header[2].split(".")]
            table = _numbered(names, counts, opens=header[1] == "[[")
            numbers.setdefault(table, number)
        elif key := _KEY.match(line):
            numbers.setdefault((*table, key[1]), number)
    return numbers


def _numbered(names: list[str], counts: dict[tuple[str | int, ...], int], *, opens: bool) -> tuple[str | int, ...]:
    """Header names with the positions of the lists that they run through; `opens`: the last one starts an entry."""
    path: tuple[str | int, ...] = ()
    for index, name in enumerate(names):
        path = (*path, name)
        if opens and index == len(names) - 1:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    return path
