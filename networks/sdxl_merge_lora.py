"""Merge LoRA files with each other or, like OFT files, into an SDXL model; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/sdxl_merge_lora.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def merge(args: argparse.Namespace) -> None:
    """Merge the networks that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from networks.merge_jobs import merge_sdxl

    merge_sdxl(options.network_merge)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "merge_to_sd_model": "networks.tool_functions:merge_to_sdxl_model",
    "merge_lora_models": "networks.tool_functions:merge_sdxl_lora_models",
    "save_to_file": "networks.tool_functions:save_to_file",
    "load_state_dict": "networks.tool_functions:load_state_dict",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: merge(parse(SCRIPT)))
