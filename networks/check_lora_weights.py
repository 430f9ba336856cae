"""List the tensors of a LoRA file with their shape, mean and smallest absolute value; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/check_lora_weights.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def check(args: argparse.Namespace) -> None:
    """Show the file that a namespace names."""
    options = resolve(args, SCRIPT)
    from networks.inspection import show

    show(options.network_check)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "main": "networks.inspection:show_file",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: check(parse(SCRIPT)))
