"""Cut a DyLoRA file into LoRA files of lower ranks; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/extract_lora_from_dylora.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def split(args: argparse.Namespace) -> None:
    """Split the network that a namespace names."""
    options = resolve(args, SCRIPT)
    from networks.resizing import split_network

    split_network(options.network_split)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "split_lora_model": "networks.tool_functions:split_lora_model",
    "load_state_dict": "networks.tool_functions:load_state_dict",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: split(parse(SCRIPT)))
