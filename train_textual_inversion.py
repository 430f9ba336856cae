"""Teach the text encoder of a Stable Diffusion 1.x or 2.x model a new word; docs/train_ti.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "train_textual_inversion.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main() -> None:
    """Read the options, check them before anything heavy is loaded, and train."""
    args = parse(SCRIPT)
    resolve(args, SCRIPT)
    from library.training.textual_inversion_trainer import TextualInversionTrainer

    TextualInversionTrainer().train(args)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "TextualInversionTrainer": "library.training.textual_inversion_trainer:TextualInversionTrainer",
    "train_util": "library.train_util:",
    "imagenet_templates_small": "library.data.templates:imagenet_templates_small",
    "imagenet_style_templates_small": "library.data.templates:imagenet_style_templates_small",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
