"""Functions of others that stand in for this program's own, by assignment to an old module name.

`library.train_util.load_tokenizer = mine` reaches the trainer: the porch puts `mine` here, and the room that would
call its own function asks first. Each name keeps the signature it had in sd-scripts 0.7.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Old module -> names that may be assigned; every one is asked for by a room.
REPLACEABLE: dict[str, tuple[str, ...]] = {
    "train_util": ("load_tokenizer", "_load_target_model", "get_step_ckpt_name", "conditional_loss"),
    "sdxl_train_util": ("load_tokenizers", "load_target_model", "_load_target_model"),
    "config_util": ("generate_dataset_group_by_blueprint",),
}
# Assigned by programs that run the trainers inside themselves; there is nothing to do about them.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {"utils": ("setup_logging",)}

_replaced: dict[tuple[str, str], Callable[..., Any]] = {}


def replace(module: str, name: str, function: Callable[..., Any] | None) -> bool:
    """Put a function in place of the program's own (None: the own one again); False if the name is not replaceable."""
    if name not in REPLACEABLE.get(module, ()):
        return name in WITHOUT_EFFECT.get(module, ())
    if function is None:
        _replaced.pop((module, name), None)
    else:
        _replaced[module, name] = function
    return True


def replacement(module: str, name: str) -> Callable[..., Any] | None:
    """The function that was put in place of an old module's, or None."""
    return _replaced.get((module, name))
