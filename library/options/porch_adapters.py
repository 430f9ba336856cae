"""Old functions on a script's namespace, as other programs call them."""

from __future__ import annotations

import argparse
from typing import Any

from library.messages import log, set_up, set_up_from, warn_once
from library.options import checks, config_file
from library.options.declare import Option, from_namespace
from library.options.parser import OptionParser, Resolved, defaults
from library.options.scripts import CONCERNS

SECRETS = ("wandb_api_key", "huggingface_token")


def verify_training_args(args: argparse.Namespace) -> None:
    """Check combinations of training options; switches `cache_latents` on where caching to disk needs it.

    Raises:
        UserError: options that contradict each other.
    """
    if getattr(args, "cache_latents_to_disk", False) and not args.cache_latents:
        warn_once("--cache_latents_to_disk switches --cache_latents on")
        args.cache_latents = True
    plain = argparse.Namespace(**{**defaults("train_network.py"), **vars(args)})
    configs = {name: from_namespace(CONCERNS[name], plain) for name in ("model", "objective", "precision", "samples")}
    options = Resolved(script="train_network.py", configs=configs)
    for check in (checks.check_model, checks.check_objective, checks.check_precision, checks.check_samples):
        check(options)


def verify_command_line_training_args(args: argparse.Namespace) -> None:
    """Say that tokens on the command line can be seen by others."""
    given = [name for name in SECRETS if getattr(args, name, None)]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        warn_once(f"{names} on the command line can be seen by others; put it in --config_file or log in instead")


def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """A new namespace with the values of `--config_file` under those of the command line.

    Args:
        args: parsed by `parser`; untouched.
        parser: any argparse parser; its options decide how values are read.

    Raises:
        UserError: file missing or broken, wrong values.
        SystemExit: 0 after `--output_config` wrote the file.
    """
    merged = argparse.Namespace(**vars(args))
    for name, value in (("strict", False), ("output_config", False)):
        if not hasattr(merged, name):
            setattr(merged, name, value)
    if not getattr(merged, "config_file", None):
        return merged
    return config_file.merge(merged, [_option(a) for a in parser._actions if a.option_strings], _given(args, parser))


def _given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> frozenset[str]:
    """What the command line gave, as far as that can be told from an ordinary parser."""
    if isinstance(parser, OptionParser):
        return parser.given
    return frozenset(k for k, v in vars(args).items() if v != parser.get_default(k))


def _option(action: argparse.Action) -> Option:
    flag = action.nargs == 0
    return Option(
        dest=action.dest,
        flag=action.option_strings[0],
        value_type=bool if flag else action.type or str,
        default=action.default,
        choices=tuple(action.choices) if action.choices else None,
        nargs=None if flag else str(action.nargs) if action.nargs else None,
        help=action.help or "",
        is_flag=flag,
    )


def setup_logging(args: Any = None, log_level: str | None = None, reset: bool = False) -> None:
    """Send messages to the console; `args` may carry the console options. Kept once set up unless `reset`."""
    if log.handlers and not reset:
        return
    if args is not None:
        set_up_from(args)
    else:
        set_up(log_level or "INFO")
