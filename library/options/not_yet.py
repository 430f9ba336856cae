"""Options that a script's frozen command line has and the script cannot do yet: given, they stop with a clear word.

The picture scripts keep theirs beside their other checks (`library/generation/checks.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.messages import UserError

if TYPE_CHECKING:
    from library.options.parser import Resolved

_OF_TRAININGS = {
    "deepspeed": "DeepSpeed",
}

# Script -> option that switches a feature on -> the feature. Options that only tune it stand in `effects.py`.
NOT_YET: dict[str, dict[str, str]] = {
    "train_network.py": _OF_TRAININGS,
    "sdxl_train_network.py": _OF_TRAININGS,
    "train_db.py": _OF_TRAININGS,
    "fine_tune.py": _OF_TRAININGS,
    "sdxl_train.py": _OF_TRAININGS,
    "train_textual_inversion.py": _OF_TRAININGS,
    "train_textual_inversion_XTI.py": _OF_TRAININGS,
    "sdxl_train_textual_inversion.py": _OF_TRAININGS,
}


def refuse_not_yet(options: Resolved) -> None:
    """Stop at the first given option whose feature is still to come.

    Raises:
        UserError: there is one.
    """
    for name, feature in NOT_YET.get(options.script, {}).items():
        if name in options.given:
            raise UserError(f"--{name}: {feature} is not supported yet", "leave the option out")
