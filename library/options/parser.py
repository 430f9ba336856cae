"""Command line -> namespace -> frozen configs.

`parse` is what a script's door calls; `resolve` turns its namespace (or one that a third party built) into the
configs that everything below the door takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from library import messages
from library.options import config_file
from library.options.declare import from_namespace
from library.options.registries import nearest
from library.options.schema import schema
from library.options.scripts import CONCERNS, find_script
from library.options.sdxl import switch_text_cache_on

_UNSET = object()


class OptionParser(argparse.ArgumentParser):
    """An argument parser that remembers which options the command line gave (`given`, a set of dests)."""

    given: frozenset[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage, with nearest names for unknown options; exit code 2."""
        head, _, names = message.partition("unrecognized arguments: ")
        if not head:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = {n: nearest(n.split("=")[0], known, 1) for n in names.split() if n.startswith("--")}
            hints = [f"did you mean {found[0]} instead of {name}?" for name, found in near.items() if found]
            message = "; ".join([message, *hints])
        self.exit(2, f"{self.prog}: error: {message} (--help shows all options)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, and sets `given`."""
        namespace = argparse.Namespace() if namespace is None else namespace
        preset = [a for a in self._actions if a.dest != argparse.SUPPRESS and not hasattr(namespace, a.dest)]
        for action in preset:
            setattr(namespace, action.dest, _UNSET)
        namespace, rest = super().parse_known_args(args, namespace)
        self.given = frozenset(k for k, v in vars(namespace).items() if v is not _UNSET)
        for action in preset:
            if getattr(namespace, action.dest) is not _UNSET:
                continue
            if action.default is argparse.SUPPRESS:
                delattr(namespace, action.dest)
                continue
            default = action.default
            setattr(namespace, action.dest, self._get_value(action, default) if isinstance(default, str) else default)
        return namespace, rest


def build_parser(script: str) -> OptionParser:
    """The parser of a script, without side effects.

    Args:
        script: path from the top folder, e.g. `train_network.py`.
    """
    entry = find_script(script)
    parser = OptionParser(prog=script, description=entry.summary, epilog="Every option: docs/options.md")
    for concern, options in entry.groups():
        group = parser.add_argument_group(concern.replace("_", " "), (CONCERNS[concern].__doc__ or "").split("\n")[0])
        for option in options:
            option.add_to(group)
    return parser


def parse(script: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read command line and config file. The parser's own errors exit with 2.

    Args:
        argv: arguments instead of the process's own.

    Raises:
        UserError: a config file that is missing, broken or has values of a wrong type; required options missing.
        SystemExit: 0 after `--help`, `--dump_schema`, `--output_config`.
    """
    parser = build_parser(script)
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--dump_schema" in argv:  # asked without what the script itself requires
        messages.write(json.dumps(schema(script), indent=2))
        raise SystemExit(0)
    namespace = parser.parse_args(argv)
    messages.set_up_from(namespace)
    if getattr(namespace, "config_file", None):
        config_file.merge(namespace, find_script(script).options(), parser.given)
        messages.set_up_from(namespace)
    return namespace


@dataclass(frozen=True)
class Resolved:
    """A run's options: `options.loop.max_train_steps`, `options.dataset.resolution`, ...

    Attributes:
        script: whose options these are.
        configs: concern -> its frozen config.
        given: options whose value is not the script's default.
    """

    script: str
    configs: Mapping[str, Any]
    given: frozenset[str] = frozenset()

    def __getattr__(self, concern: str) -> Any:
        configs = self.__dict__.get("configs", {})
        if concern not in configs:
            raise AttributeError(f"{self.__dict__.get('script')} has no options of concern {concern!r}")
        return configs[concern]

    def __contains__(self, concern: str) -> bool:
        return concern in self.configs

    def value(self, name: str, default: Any = None) -> Any:
        """The value of an option by name, whichever concern has it."""
        for config in self.configs.values():
            if hasattr(config, name):
                return getattr(config, name)
        return default

    def replace(self, **changes: Any) -> Resolved:
        """A copy with other values: `options.replace(learning_rate=None)`; the effective settings of a run."""
        configs = {}
        for concern, config in self.configs.items():
            own = {k: v for k, v in changes.items() if hasattr(config, k)}
            configs[concern] = dataclasses.replace(config, **own) if own else config
        return dataclasses.replace(self, configs=configs)


def defaults(script: str) -> dict[str, Any]:
    """Option -> default in this script."""
    return {option.dest: option.default for option in find_script(script).options()}


def complete(namespace: argparse.Namespace, script: str) -> argparse.Namespace:
    """Give a namespace the options it lacks (the same object); attributes that are no options: one warning."""
    known = defaults(script)
    for name, default in known.items():
        if not hasattr(namespace, name):
            setattr(namespace, name, default)
    unknown = [name for name in vars(namespace) if name not in known]
    if unknown:
        messages.warn_once(config_file.unknown_message(unknown, known))
    return namespace


def resolve(namespace: argparse.Namespace, script: str = "train_network.py") -> Resolved:
    """Namespace -> checked configs. The namespace gets the values that the rules below change, as hooks read them.

    Args:
        namespace: from `parse`, a parser of `build_parser`, or built by hand.
        script: path from the top folder.

    Raises:
        UserError: options that are missing or contradict each other.
    """
    from library.options.checks import check

    complete(namespace, script)
    _write_back(namespace)
    known = defaults(script)
    plain = argparse.Namespace(**{k: _as_text(k, v) for k, v in vars(namespace).items() if k in known})
    configs = {c: from_namespace(CONCERNS[c], plain) for c in find_script(script).concerns}
    given = frozenset(k for k, default in known.items() if getattr(plain, k) != default)
    resolved = Resolved(script=script, configs=configs, given=given)
    check(resolved)
    return resolved


def _write_back(namespace: argparse.Namespace) -> None:
    """Old spellings and implied switches, in place."""
    if getattr(namespace, "caption_extention", None) is not None:
        namespace.caption_extension, namespace.caption_extention = namespace.caption_extention, None
    if getattr(namespace, "cache_latents_to_disk", False) and not namespace.cache_latents:
        messages.warn_once("--cache_latents_to_disk switches --cache_latents on")
        namespace.cache_latents = True
    switch_text_cache_on(namespace)
    if getattr(namespace, "diffusers_xformers", False) and not namespace.xformers:
        messages.warn_once("--diffusers_xformers is the old name of --xformers")
        namespace.xformers = True
    rates = getattr(namespace, "text_encoder_lr", None)
    if isinstance(rates, (list, tuple)) and len(rates) < 2:
        namespace.text_encoder_lr = rates[0] if rates else None


def _as_text(name: str, value: Any) -> Any:
    """Hooks may have left number pairs where the command line has `A,B`."""
    if name in ("resolution", "face_crop_aug_range") and isinstance(value, (tuple, list)):
        return ",".join(str(v) for v in value)
    return value
