"""Which parameters learn, in which groups, at which rates."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from library.messages import UserError
from library.models.dimensions import TextDimensions
from library.models.family import family
from library.models.text_encoders import empty_text_encoder, text_config
from library.models.unet_config import SdxlUNetConfig
from library.models.unet_sdxl import from_config
from library.options.model_training import UNET_BLOCKS, block_rates
from library.training.model_parts import Rates, block_of, encoder_names, freeze_parts, trained_parts


@pytest.fixture(scope="module")
def sdxl_unet() -> nn.Module:
    """At full size, without memory."""
    with torch.device("meta"):
        return from_config(SdxlUNetConfig())


def encoder(layers: int = 2) -> nn.Module:
    return empty_text_encoder(text_config(TextDimensions(64, layers, 128)))


def test_every_parameter_of_sdxl_has_its_block(sdxl_unet: nn.Module) -> None:
    counts = Counter(block_of(name) for name, _ in sdxl_unet.named_parameters())
    assert sorted(counts) == list(range(UNET_BLOCKS))
    assert block_of("time_embed.0.weight") == block_of("label_emb.0.0.bias") == 0
    assert [block_of(f"input_blocks.{k}.0.bias") for k in range(9)] == list(range(1, 10))
    assert [block_of(f"middle_block.{k}.norm.bias") for k in range(3)] == [10, 11, 12]
    assert [block_of(f"output_blocks.{k}.0.bias") for k in range(9)] == list(range(13, 22))
    assert block_of("out.2.weight") == 22


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0.conv1.weight", "input_blocks.9.0.weight", "else"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"block"):
        block_of(name)


def test_one_group_where_nothing_has_a_rate_of_its_own() -> None:
    unet, text = nn.Linear(2, 2), encoder()
    (part,) = trained_parts(unet, [text], Rates(unet=1.0, text=(1.0,)))
    assert part.name == "unet+text_encoder" and part.rate == 1.0
    assert list(part.parameters) == [*unet.parameters(), *text.parameters()]


def test_a_group_for_each_part_with_its_own_rate() -> None:
    unet, texts = nn.Linear(2, 2), [encoder(), encoder()]
    rates = Rates(unet=1.0, text=(0.5, 0.0), apart=True)
    freeze_parts(unet, texts, rates)
    parts = trained_parts(unet, texts, rates)
    assert [(part.name, part.rate) for part in parts] == [("unet", 1.0), ("text_encoder1", 0.5)]
    assert not any(p.requires_grad for p in texts[1].parameters())
    assert encoder_names(1) == ("text_encoder",)


def test_a_rate_of_0_freezes_a_block(sdxl_unet: nn.Module) -> None:
    values = tuple(0.0 if index in (0, 12) else 0.1 * index for index in range(UNET_BLOCKS))
    rates = Rates(unet=1.0, text=(0.0, 0.3), blocks=values)
    texts = [encoder(), encoder()]
    freeze_parts(sdxl_unet, texts, rates)
    parts = trained_parts(sdxl_unet, texts, rates)
    assert [part.name for part in parts] == [*(f"block{i}" for i in range(1, 23) if i != 12), "text_encoder2"]
    assert [part.rate for part in parts] == pytest.approx([*(v for v in values if v), 0.3])
    for name, parameter in sdxl_unet.named_parameters():
        assert parameter.requires_grad == (block_of(name) not in (0, 12)), name
    sdxl_unet.requires_grad_(True)


def test_what_gives_nothing_does_not_learn() -> None:
    """The last layer and final norm of SDXL's first encoder; the layers that clip skip leaves out."""
    texts = [encoder(3), encoder(3)]
    idle = family("sdxl").idle_parameters(texts)
    names = {name for name, p in texts[0].named_parameters() if any(p is one for one in idle)}
    assert {name.split(".layers.")[-1][0] for name in names if ".layers." in name} == {"2"}
    assert {name for name in names if "final_layer_norm" in name} and len(names) == len(idle) == 18
    assert family("sd").idle_parameters(texts[:1], None) == family("sd").idle_parameters(texts[:1], 1) == []
    assert len(family("sd").idle_parameters(texts[:1], 2)) == 16
    freeze_parts(nn.Linear(2, 2), texts, Rates(unet=1.0, text=(1.0, 1.0)), idle)
    assert not any(p.requires_grad for p in idle)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (",".join(["1e-4"] * 22), "has 22 numbers"),
        (",".join(["x"] * 23), "'x' is not a number"),
        (",".join(["-1"] * 23), "negative"),
    ],
)
def test_block_rates_that_cannot_be_used(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        block_rates(text)


def test_block_rates() -> None:
    assert block_rates(None) is None
    assert block_rates(", ".join(str(i) for i in range(23))) == [float(i) for i in range(23)]
