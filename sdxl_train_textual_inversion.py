"""Teach both text encoders of an SDXL model a new word; docs/train_ti.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "sdxl_train_textual_inversion.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main() -> None:
    """Read the options, check them before anything heavy is loaded, and train."""
    args = parse(SCRIPT)
    resolve(args, SCRIPT)
    from library.training.textual_inversion_trainer import SdxlTextualInversionTrainer

    SdxlTextualInversionTrainer().train(args)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "SdxlTextualInversionTrainer": "library.training.textual_inversion_trainer:SdxlTextualInversionTrainer",
    "train_textual_inversion": "train_textual_inversion:",
    "train_util": "library.train_util:",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
