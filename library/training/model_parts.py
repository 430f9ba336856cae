"""Which parameters of a model learn, in which groups and at which rates (training.md 2.6 and 19.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from library.messages import UserError
from library.options.model_training import UNET_BLOCKS

if TYPE_CHECKING:
    from library.models.family import LoadedModel

UNET = "unet"
# Of the text encoders, as `Family.repeated_block_classes` of the U-Nets.
TEXT_BLOCK_CLASSES = ("CLIPEncoderLayer",)
# Prefix of a parameter's name in an SDXL U-Net -> number of its block, or of the first one of a list of blocks.
_FIRST_BLOCKS = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
_BLOCK_COUNTS = {"input_blocks": 9, "middle_block": 3, "output_blocks": 9}


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters that share a rate.

    Attributes:
        name: in logs.
        parameters: in the model's order.
        rate: their learning rate; None for the optimizer's own.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    rate: float | None


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates of a model's parts; 0 leaves a part as it is.

    Attributes:
        unet: of the U-Net.
        text: of each text encoder.
        blocks: of the U-Net's blocks instead of `unet`, or None.
        apart: every part gets a group of its own, though the rates are equal.
    """

    unet: float
    text: tuple[float, ...]
    blocks: tuple[float, ...] | None = None
    apart: bool = False

    @property
    def trains_unet(self) -> bool:
        return bool(self.unet) if self.blocks is None else any(self.blocks)

    @property
    def trains_text(self) -> bool:
        return any(self.text)


def trained_modules(model: LoadedModel, rates: Rates) -> dict[str, nn.Module]:
    """Names and modules of the parts that learn or have learned, U-Net first."""
    modules: dict[str, nn.Module] = {UNET: model.unet} if rates.trains_unet else {}
    names = ("text_encoder", "text_encoder_2")
    for name, encoder, rate in zip(names, model.text_encoders, rates.text, strict=False):
        if rate:
            modules[name] = encoder
    return modules


def encoder_names(count: int) -> tuple[str, ...]:
    """What the text encoders are called in logs."""
    return ("text_encoder",) if count == 1 else tuple(f"text_encoder{number}" for number in range(1, count + 1))


def freeze_parts(
    unet: nn.Module, text_encoders: Sequence[nn.Module], rates: Rates, idle: Iterable[nn.Parameter] = ()
) -> None:
    """Switch gradients on for what learns, and off for everything else.

    Args:
        idle: parameters of the text encoders on which no output depends.
    """
    if rates.blocks is None:
        unet.requires_grad_(bool(rates.unet))
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(bool(rates.blocks[block_of(name)]))
    for encoder, rate in zip(text_encoders, rates.text, strict=True):
        encoder.requires_grad_(bool(rate))
    for parameter in idle:
        parameter.requires_grad_(False)


def trained_parts(unet: nn.Module, text_encoders: Sequence[nn.Module], rates: Rates) -> list[Part]:
    """The optimizer's groups: one for everything that learns, or one a part where the parts differ."""
    if rates.blocks is None:
        parts = [Part(UNET, _learning(unet.parameters()), rates.unet)]
    else:
        parts = block_parts(unet, rates.blocks)
    names = encoder_names(len(text_encoders))
    for name, encoder, rate in zip(names, text_encoders, rates.text, strict=True):
        parts.append(Part(name, _learning(encoder.parameters()), rate))
    parts = [part for part in parts if part.parameters]
    if rates.apart or rates.blocks is not None or len(parts) < 2:
        return parts
    together = tuple(parameter for part in parts for parameter in part.parameters)
    return [Part("+".join(part.name for part in parts), together, parts[0].rate)]


def block_parts(unet: nn.Module, rates: Sequence[float]) -> list[Part]:
    """A group for each block of an SDXL U-Net whose rate is not 0."""
    blocks: list[list[nn.Parameter]] = [[] for _ in range(UNET_BLOCKS)]
    for name, parameter in unet.named_parameters():
        blocks[block_of(name)].append(parameter)
    return [Part(f"block{i}", tuple(blocks[i]), rate) for i, rate in enumerate(rates) if rate and blocks[i]]


def block_of(name: str) -> int:
    """Number from 0 to 22 of the block that a parameter of an SDXL U-Net belongs to.

    Raises:
        UserError: a name that is not one of theirs.
    """
    match = re.match(r"(\w+)\.(\d+)?", name)
    kind = match.group(1) if match else ""
    if match is None or kind not in _FIRST_BLOCKS:
        raise UserError(f"the U-Net's parameter {name} belongs to no block", "--block_lr needs an SDXL model")
    if kind not in _BLOCK_COUNTS:
        return _FIRST_BLOCKS[kind]
    number = int(match.group(2))
    if number >= _BLOCK_COUNTS[kind]:
        raise UserError(
            f"the U-Net has more blocks than --block_lr has rates ({kind}.{number})",
            "leave --block_lr out: it needs a U-Net with SDXL's number of blocks",
        )
    return _FIRST_BLOCKS[kind] + number


def _learning(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in parameters if parameter.requires_grad)
