"""Options are the fields of frozen dataclasses: one source for name, type, default, choices and help.

A concern (`library/options/<concern>.py`) declares

    @dataclass(frozen=True, kw_only=True, slots=True)
    class LoopConfig:
        max_train_steps: int = option(1600, "number of optimizer steps")

and everything else (parsers, config files, checks, docs) is derived from `options_of(LoopConfig)`.
The annotation decides how text is read: `bool` is a flag, `list[...]` takes several values,
`X | None` may be left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any


def option(
    default: Any = None,
    help: str = "",
    *,
    flag: str | None = None,
    short: str | None = None,
    choices: tuple[Any, ...] | None = None,
    nargs: str | None = None,
    type: Any = None,
    required: bool = False,
) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: value when neither command line nor config file gives one.
        help: one sentence for `--help` and `docs/options.md`.
        flag: the flag, when it is not `--<field name>`; without dashes it is a positional argument.
        short: a second flag of one letter, e.g. `-s`.
        choices: allowed values.
        nargs: `*` or `+` for lists (default `*`).
        type: a function text -> value, when the annotation does not say enough (`bool`: a text, not a flag).
        required: the parser itself insists on it; scripts with a config file check `Script.required` instead.
    """
    meta = {"help": help, "flag": flag, "short": short, "choices": choices, "nargs": nargs, "type": type}
    meta["required"] = required
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One resolved option: a dataclass field as the parser, the docs and the schema see it."""

    dest: str
    flag: str
    value_type: Any
    default: Any
    choices: tuple[Any, ...] | None
    nargs: str | None
    help: str
    is_flag: bool = False
    short: str | None = None
    required: bool = False

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add this option to an argparse parser."""
        help = self.help.replace("%", "%%")
        if not self.flag.startswith("-"):
            parser.add_argument(self.dest, metavar=self.flag, type=self.value_type, help=help)
            return
        flags = [self.short, self.flag] if self.short else [self.flag]
        if self.is_flag:
            parser.add_argument(*flags, dest=self.dest, action="store_true", default=self.default, help=help)
            return
        shown = "" if self.default in (None, "") else " (default: %(default)s)"
        parser.add_argument(
            *flags,
            dest=self.dest,
            type=self.value_type,
            default=self.default,
            choices=list(self.choices) if self.choices else None,
            nargs=self.nargs,
            required=self.required,
            help=help + shown,
        )


def _element_type(annotation: Any) -> tuple[Any, bool]:
    """Annotation -> (type of one value, is a list)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        annotation = inner[0]
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def options_of(config_class: type) -> list[Option]:
    """The options that a concern's dataclass declares, in field order."""
    hints = typing.get_type_hints(config_class)
    result = []
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue
        meta = field.metadata
        element, is_list = _element_type(hints[field.name])
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        result.append(
            Option(
                dest=field.name,
                flag=meta["flag"] or f"--{field.name}",
                value_type=meta["type"] or element,
                default=default,
                choices=meta["choices"],
                nargs=(meta["nargs"] or "*") if is_list else None,
                help=meta["help"],
                is_flag=element is bool and meta["type"] is None,
                short=meta["short"],
                required=meta["required"],
            )
        )
    return result


ConfigT = typing.TypeVar("ConfigT", bound=Any)


def from_namespace(config_class: type[ConfigT], namespace: argparse.Namespace) -> ConfigT:
    """Build a concern's config from a parsed namespace; options that the script lacks keep their defaults."""
    names = {f.name for f in dataclasses.fields(config_class)}
    return config_class(**{k: v for k, v in vars(namespace).items() if k in names})
