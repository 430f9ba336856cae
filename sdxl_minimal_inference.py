"""Draw one picture with an SDXL model: the shortest way from a prompt for each text encoder to a file."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "sdxl_minimal_inference.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main(args: argparse.Namespace | None = None) -> None:
    """Read the options (or take them from a caller) and draw."""
    args = parse(SCRIPT) if args is None else args
    options = resolve(args, SCRIPT)
    from library.generation.minimal import run as draw

    draw(options, network_module="networks.lora")


if __name__ == "__main__":
    run(main)
