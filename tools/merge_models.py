"""Merge models of one family by a weighted sum; docs/models.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/merge_models.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def merge(args: argparse.Namespace) -> None:
    """Merge the models that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from library.models.merging import merge_files

    merge_files(options.model_merge)


if __name__ == "__main__":
    run(lambda: merge(parse(SCRIPT)))
