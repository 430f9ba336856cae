"""Extract a LoRA file from the difference of two models; docs/networks.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "networks/extract_lora_from_models.py"
MIN_DIFF = 0.01


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def svd(model_org: argparse.Namespace | str | None = None, *rest: Any, **named: Any) -> None:
    """Extract as a namespace says, its only argument, or as values in the order of `ARGUMENTS` or by name say."""
    if isinstance(model_org, argparse.Namespace):
        args = model_org
    else:
        values = dict(zip(ARGUMENTS, (model_org, *rest), strict=False))
        args = argparse.Namespace(**{k: v for k, v in {**values, **named}.items() if v is not None})
    options = resolve(args, SCRIPT)
    from networks.extraction import extract_network

    extract_network(options.network_extract)


ARGUMENTS = (
    *("model_org", "model_tuned", "save_to", "dim", "v2", "sdxl", "conv_dim", "v_parameterization", "device"),
    *("save_precision", "clamp_quantile", "min_diff", "no_metadata", "load_precision"),
    *("load_original_model_to", "load_tuned_model_to"),
)
# Names that others import from this script.
NAMES: dict[str, str] = {
    "save_to_file": "networks.tool_functions:save_to_file",
    "CLAMP_QUANTILE": "networks.algebra:CLAMP_QUANTILE",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(lambda: svd(parse(SCRIPT)))
