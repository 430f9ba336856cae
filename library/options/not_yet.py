"""Options that a script's frozen command line has and the script cannot do yet: given, they stop with a clear word.

The picture scripts keep theirs beside their other checks (`library/generation/checks.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.messages import UserError

if TYPE_CHECKING:
    from library.options.parser import Resolved

_OF_TRAININGS = {
    "validation_split": "the validation loss",
    "deepspeed": "DeepSpeed",
    "fp8_base": "8-bit base models",
    "fp8_base_unet": "8-bit base models",
    "cpu_offload_checkpointing": "activations in CPU memory",
}
_OF_MODELS = {name: feature for name, feature in _OF_TRAININGS.items() if not name.startswith("fp8_base")}

# Script -> option that switches a feature on -> the feature. Options that only tune it stand in `effects.py`.
NOT_YET: dict[str, dict[str, str]] = {
    "train_network.py": _OF_TRAININGS,
    "sdxl_train_network.py": _OF_TRAININGS,
    "train_db.py": {name: feature for name, feature in _OF_MODELS.items() if name != "in_json"},
    "fine_tune.py": _OF_MODELS,
    "sdxl_train.py": _OF_MODELS,
}


def refuse_not_yet(options: Resolved) -> None:
    """Stop at the first given option whose feature is still to come.

    Raises:
        UserError: there is one.
    """
    for name, feature in NOT_YET.get(options.script, {}).items():
        if name in options.given:
            raise UserError(f"--{name}: {feature} is not supported yet", "leave the option out")
