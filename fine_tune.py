"""Train a Stable Diffusion 1.x or 2.x model on pictures of a metadata file; docs/fine_tune.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "fine_tune.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def train(args: argparse.Namespace) -> None:
    """The whole run of a namespace from `setup_parser`, or built by hand."""
    resolve(args, SCRIPT)
    from library.training.recipes.model import FineTuneRecipe
    from library.training.recipes.recipe import train_by

    train_by(FineTuneRecipe(), args)


def main() -> None:
    """Read the options and train."""
    train(parse(SCRIPT))


# Names that others import from this script.
NAMES: dict[str, str] = {
    "train_util": "library.train_util:",
    "config_util": "library.config_util:",
    "custom_train_functions": "library.custom_train_functions:",
    "ConfigSanitizer": "library.config_util:ConfigSanitizer",
    "BlueprintGenerator": "library.config_util:BlueprintGenerator",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
