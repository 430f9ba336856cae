"""Show the metadata of a safetensors file; docs/models.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/show_metadata.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def show(args: argparse.Namespace) -> None:
    """Show the metadata of the file that a namespace names."""
    options = resolve(args, SCRIPT)
    from library.models.metadata_view import show_metadata

    show_metadata(options.model_metadata)


if __name__ == "__main__":
    run(lambda: show(parse(SCRIPT)))
