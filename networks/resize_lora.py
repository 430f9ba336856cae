"""Change the rank of a LoRA file by the singular values of its updates; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/resize_lora.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def resize(args: argparse.Namespace) -> None:
    """Resize the network that a namespace names; options that it lacks take their defaults."""
    options = resolve(args, SCRIPT)
    from networks.resizing import resize_network

    resize_network(options.network_resize)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "resize_lora_model": "networks.tool_functions:resize_lora_model",
    "save_to_file": "networks.tool_functions:save_to_file",
    "load_state_dict": "networks.tool_functions:load_state_dict",
    "index_sv_cumulative": "networks.algebra:index_sv_cumulative",
    "index_sv_fro": "networks.algebra:index_sv_fro",
    "index_sv_ratio": "networks.algebra:index_sv_ratio",
    "rank_resize": "networks.algebra:rank_resize",
    "extract_conv": "networks.tool_functions:extract_conv",
    "extract_linear": "networks.tool_functions:extract_linear",
    "merge_conv": "networks.tool_functions:merge_conv",
    "merge_linear": "networks.tool_functions:merge_linear",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: resize(parse(SCRIPT)))
