"""Train an SDXL model; docs/train_sdxl.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "sdxl_train.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def train(args: argparse.Namespace) -> None:
    """The whole run of a namespace from `setup_parser`, or built by hand."""
    resolve(args, SCRIPT)
    from library.training.recipes.model import SdxlModelRecipe
    from library.training.recipes.recipe import train_by

    train_by(SdxlModelRecipe(), args)


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
    "sdxl_train_util": "library.sdxl_train_util:",
    "sdxl_model_util": "library.sdxl_model_util:",
    "UNET_NUM_BLOCKS_FOR_BLOCK_LR": "library.options.model_training:UNET_BLOCKS",
    "get_block_params_to_optimize": "library.training.classic_training:get_block_params_to_optimize",
    "append_block_lr_to_logs": "library.training.classic_training:append_block_lr_to_logs",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
