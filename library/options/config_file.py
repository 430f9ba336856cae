"""Options in a TOML file: read under the command line, written by `--output_config`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.messages import UserError, log, warn_once
from library.options.declare import Option, option
from library.options.foreign_keys import FOREIGN_KEYS
from library.options.registries import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFileConfig:
    """The options themselves, in a file."""

    config_file: str | None = option(
        None, "TOML file with options; sections mean nothing and the command line wins (`.toml` is added when missing)"
    )
    output_config: bool = option(False, "write the given options to --config_file, without tokens, and exit")
    strict: bool = option(False, "stop at keys of --config_file that are no option of this script, instead of warning")


# Never written by --output_config: what steers the file itself, and secrets.
NOT_WRITTEN = frozenset({"config_file", "output_config", "dump_schema", "wandb_api_key", "huggingface_token"})
# Tables that only a data-set file has.
DATASET_TABLES = ("datasets",)


def toml_path(name: str) -> Path:
    """The file that `--config_file NAME` means."""
    return Path(name if name.endswith(".toml") else name + ".toml")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, UTF-8 with or without a byte order mark.

    Raises:
        UserError: missing, a folder, not UTF-8, or no TOML (with the parser's line and, for backslashes, the cure).
    """
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    try:
        return tomllib.loads(text)
    except ValueError as error:
        remedy = "write Windows paths in 'single quotes' or with /" if "\\" in text else "mend the line"
        raise UserError(f"{path} is no valid TOML: {error}", remedy) from None


def flatten(data: dict[str, Any]) -> dict[str, Any]:
    """Top level and tables of depth 1 in one dictionary, later ones win; section names mean nothing."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(value)
        else:
            flat[key] = value
    return flat


def is_dataset_file(data: dict[str, Any]) -> bool:
    """True for the content of a data-set file (`[[datasets]]`)."""
    return any(isinstance(data.get(table), list) for table in DATASET_TABLES)


def refuse_training_file(path: Path, data: dict[str, Any], known: Collection[str]) -> None:
    """Stop when a file given as `--dataset_config` holds a training script's options instead.

    Args:
        data: the file's content.
        known: names of the script's options.
    """
    if is_dataset_file(data) or "general" in data:
        return
    found = [key for key in flatten(data) if key in known]
    if found:
        raise UserError(
            f"{path} holds training options ({', '.join(found[:3])}) and no [[datasets]]",
            "give it as --config_file, or add [[datasets]] with [[datasets.subsets]]",
        )


def merge(namespace: argparse.Namespace, options: Sequence[Option], given: Collection[str]) -> argparse.Namespace:
    """Put a config file's values under the command line's, in place; or write the file for `--output_config`.

    Args:
        namespace: parsed command line with `config_file` set; that loses its last extension.
        options: the script's options.
        given: dests that the command line gave; they win.

    Raises:
        UserError: file missing or broken, a data-set file, a value of a wrong type, unknown keys with `--strict`.
        SystemExit: 0 after the file was written.
    """
    path = toml_path(namespace.config_file)
    if namespace.output_config and "output_config" in given:
        write_config(namespace, options, path)
        raise SystemExit(0)
    data = read_toml(path)
    if is_dataset_file(data):
        raise UserError(f"{path} is a data-set file (it has [[datasets]])", "give it as --dataset_config")
    by_name = {option.dest: option for option in options}
    unknown = {}
    for key, value in flatten(data).items():
        if key not in by_name:
            unknown[key] = value
        elif key not in given and key != "config_file":
            setattr(namespace, key, convert(by_name[key], value, path))
    if unknown:
        if namespace.strict:
            raise UserError(f"{path}: {unknown_message(unknown, by_name)}", "remove them or drop --strict")
        warn_once(unknown_message(unknown, by_name))
        for key, value in unknown.items():
            setattr(namespace, key, value)
    namespace.config_file = str(path.with_suffix(""))
    return namespace


def write_config(namespace: argparse.Namespace, options: Sequence[Option], path: Path) -> None:
    """Write the options that differ from their defaults as flat TOML in option order, without secrets.

    Raises:
        UserError: the file exists or cannot be written.
    """
    import toml

    values = {}
    for entry in options:
        value = getattr(namespace, entry.dest)
        if entry.dest not in NOT_WRITTEN and value is not None and value != entry.default:
            values[entry.dest] = str(value) if isinstance(value, Path) else value
    if path.exists():
        raise UserError(f"{path} exists", "remove it or name another file with --config_file")
    try:
        path.write_text(toml.dumps(values), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "name another --config_file") from None
    log.info("options written to %s", path)


def unknown_message(keys: Iterable[str], known: Iterable[str]) -> str:
    """One line about all keys that a script does not know, with nearest names."""
    keys, known = list(keys), list(known)
    elsewhere = FOREIGN_KEYS | _keys_of_trainings()
    parts = []
    for key in keys:
        if key not in elsewhere:
            near = nearest(key, known, count=1)
            parts.append(f"{key} (did you mean {near[0]}?)" if near else key)
    foreign = [key for key in keys if key in elsewhere]
    if foreign:
        parts.append(f"{', '.join(foreign)} (of other model families, scripts or front ends)")
    return f"ignored, not options of this script: {', '.join(parts)}"


def _keys_of_trainings() -> set[str]:
    from library.options.scripts import SCRIPTS  # which imports this module

    trainings = [script for script in SCRIPTS.values() if "optimizer" in script.concerns]
    return {entry.dest for script in trainings for entry in script.options()}


def convert(option: Option, value: Any, source: Path) -> Any:
    """A value of a config file -> the option's own type; texts are read as on the command line.

    Raises:
        UserError: wrong type or not among the choices.
    """
    if option.nargs:
        items = value if isinstance(value, list) else [value]
        return [_convert_one(option, item, source) for item in items]
    if isinstance(value, list) and option.value_type is str and all(_is_number(v) for v in value):
        return ",".join(str(v) for v in value)
    if value == "" and option.value_type not in (str, Path):
        return option.default
    return _convert_one(option, value, source)


def _convert_one(option: Option, value: Any, source: Path) -> Any:
    result = _typed(option, value)
    if result is _WRONG:
        raise UserError(f"{source}: {option.dest} = {value!r} is not {_noun(option)}", "correct the value")
    if option.choices and result not in option.choices:
        choices = ", ".join(str(c) for c in option.choices if c is not None)
        raise UserError(f"{source}: {option.dest} = {value!r} is not a choice", f"choose one of {choices}")
    return result


_WRONG = object()
_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _noun(option: Option) -> str:
    return _NOUNS.get(option.value_type, "a number of steps or a share such as 0.1 or 10%")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _typed(option: Option, value: Any) -> Any:
    """The value in the option's type, or `_WRONG`."""
    kind = option.value_type
    if option.is_flag:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return value if isinstance(value, bool) else _WRONG
    if isinstance(value, (bool, dict, list)):
        return _WRONG
    if kind is int and isinstance(value, float):
        return int(value) if value.is_integer() else _WRONG
    try:
        return kind(value) if kind in (int, float) else kind(str(value))
    except ValueError:
        return _WRONG
