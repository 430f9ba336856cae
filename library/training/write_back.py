"""What assembly decides and writes back into the caller's namespace, where hooks of third parties read it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from library.data.config import parse_face_range, parse_resolution
from library.messages import log
from library.options.declare import from_namespace
from library.options.parser import Resolved, resolve
from library.options.saving import SavingConfig
from library.training.report import RATES
from library.training.saving import with_epoch_ratio

if TYPE_CHECKING:
    from library.training.feed import DataFeed
    from library.training.optimizers import Built


def write_back_data_options(args: Any) -> None:
    """Number pairs where the command line had text."""
    args.resolution = parse_resolution(args.resolution)
    args.face_crop_aug_range = parse_face_range(args.face_crop_aug_range)


def write_back_length(args: Any, feed: DataFeed) -> int:
    """`--max_train_epochs` and `--save_n_epoch_ratio` as the numbers that they mean; gives the epochs of the run."""
    per_epoch = feed.updates_per_epoch
    if args.max_train_epochs is not None:
        args.max_train_steps = args.max_train_epochs * per_epoch
        log.info("%d epochs are %d steps", args.max_train_epochs, args.max_train_steps)
    epochs = -(-args.max_train_steps // per_epoch)
    args.save_every_n_epochs = with_epoch_ratio(from_namespace(SavingConfig, args), epochs).save_every_n_epochs
    return epochs


def write_back_optimizer(args: Any, built: Built) -> None:
    """What the optimizer changed (Adafactor)."""
    args.learning_rate = built.effective_config.learning_rate
    args.lr_scheduler = built.effective_config.lr_scheduler
    for name in RATES if built.ignores_group_rates else ():
        if hasattr(args, name):
            setattr(args, name, None)


def effective_options(args: Any, asked: Resolved) -> Resolved:
    """The options as the run uses them; what counts as given is what was asked for, not what assembly wrote back."""
    names = [name for name in ("learning_rate", "lr_scheduler", *RATES, "scale_weight_norms") if hasattr(args, name)]
    effective = resolve(args, asked.script).replace(**{name: getattr(args, name) for name in names})
    return dataclasses.replace(effective, given=asked.given)
