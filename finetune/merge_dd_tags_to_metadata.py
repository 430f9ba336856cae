"""Collect tag files in a metadata file; docs/data_tools.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "finetune/merge_dd_tags_to_metadata.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main(args: argparse.Namespace) -> None:
    """Do what a namespace asks for; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from library.data.text_merging import merge_files

    merge_files(options.text_merge, "tags")


if __name__ == "__main__":
    run(lambda: main(parse(SCRIPT)))
