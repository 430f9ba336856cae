"""Train a network (LoRA and its relatives) on a Stable Diffusion 1.x or 2.x model; docs/train_network.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "train_network.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main() -> None:
    """Read the options, check them before anything heavy is loaded, and train."""
    args = parse(SCRIPT)
    resolve(args, SCRIPT)
    from library.training.network_trainer import NetworkTrainer

    NetworkTrainer().train(args)


# Names that others import from this script.
NAMES: dict[str, str] = {
    "NetworkTrainer": "library.training.network_trainer:NetworkTrainer",
    "train_util": "library.train_util:",
    "config_util": "library.config_util:",
    "custom_train_functions": "library.custom_train_functions:",
    "huggingface_util": "library.huggingface_util:",
    "model_util": "library.model_util:",
    "ConfigSanitizer": "library.config_util:ConfigSanitizer",
    "BlueprintGenerator": "library.config_util:BlueprintGenerator",
    "DreamBoothDataset": "library.train_util:DreamBoothDataset",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
