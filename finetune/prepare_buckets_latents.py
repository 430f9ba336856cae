"""Choose training sizes for the pictures of a metadata file and cache their latents; docs/data_tools.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.bucket_tool import with_mask_values
from library.options.parser import build_parser, parse, resolve

SCRIPT = "finetune/prepare_buckets_latents.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main(args: argparse.Namespace) -> None:
    """Do what a namespace asks for; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from library.training.bucket_tool import prepare_buckets

    prepare_buckets(options.bucket_tool)


if __name__ == "__main__":
    run(lambda: main(parse(SCRIPT, with_mask_values(sys.argv[1:]))))
