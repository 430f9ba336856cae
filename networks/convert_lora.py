"""Convert a LoRA file between the names of this program, of diffusers and of peft; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "networks/convert_lora.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def convert(args: argparse.Namespace) -> None:
    """Convert the file that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from networks.converting import convert_file

    convert_file(options.network_convert)


if __name__ == "__main__":
    run(lambda: convert(parse(SCRIPT)))
