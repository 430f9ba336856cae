"""Encode the pictures of data sets before a training; docs/datasets.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/cache_latents.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def cache_to_disk(args: argparse.Namespace) -> None:
    """Make the files of latents for the data sets that a namespace names."""
    options = resolve(args, SCRIPT)
    from library.training.caching import fill_latent_cache

    fill_latent_cache(options)


if __name__ == "__main__":
    run(lambda: cache_to_disk(parse(SCRIPT)))
