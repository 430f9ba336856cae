"""Reading network files in every form that they have."""

from __future__ import annotations

from torch import Tensor

from library.models.checkpoint import open_checkpoint
from networks import diffusers_format


def read_network(file: str) -> dict[str, Tensor]:
    """The tensors of a network file under this program's names; LoRA of diffusers and peft is converted.

    Raises:
        UserError: not there, truncated, or not a file of tensors.
    """
    checkpoint = open_checkpoint(file)
    weights = checkpoint.read()
    if diffusers_format.is_diffusers(weights):
        return diffusers_format.to_kohya(weights, checkpoint.metadata, diffusers_format.config_beside(file))
    return weights
