"""Merge LoRA files of any ranks by the sum of their updates and its singular values; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/svd_merge_lora.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def merge(args: argparse.Namespace) -> None:
    """Merge the networks that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from networks.merge_jobs import merge_by_svd

    merge_by_svd(options.network_merge)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "merge_lora_models": "networks.tool_functions:svd_merge_lora_models",
    "save_to_file": "networks.tool_functions:save_to_file",
    "load_state_dict": "networks.tool_functions:load_state_dict",
    "CLAMP_QUANTILE": "networks.algebra:CLAMP_QUANTILE",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: merge(parse(SCRIPT)))
