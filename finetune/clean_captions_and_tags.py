"""Clean captions and tags of a metadata file; docs/data_tools.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.data_tools import without_old_folder
from library.options.parser import build_parser, parse, resolve

SCRIPT = "finetune/clean_captions_and_tags.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main(args: argparse.Namespace) -> None:
    """Do what a namespace asks for; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from library.data.text_cleaning import clean_file

    clean_file(options.text_clean)


if __name__ == "__main__":
    run(lambda: main(parse(SCRIPT, without_old_folder(sys.argv[1:]))))
