"""Convert a model between one file in Stability layout and a diffusers folder; docs/models.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/convert_diffusers20_original_sd.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def convert(args: argparse.Namespace) -> None:
    """Convert the model that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from library.models.converting import convert_model

    convert_model(options.model_convert)


if __name__ == "__main__":
    run(lambda: convert(parse(SCRIPT)))
