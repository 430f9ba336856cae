"""Show the tokens on which a LoRA file has the largest effect; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "networks/lora_interrogator.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def interrogate(args: argparse.Namespace) -> None:
    """Measure the network that a namespace names."""
    options = resolve(args, SCRIPT)
    from networks.inspection import interrogate_network

    interrogate_network(options.network_interrogate)


if __name__ == "__main__":
    run(lambda: interrogate(parse(SCRIPT)))
