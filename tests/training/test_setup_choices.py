"""Options and data-set keys that act, or are refused: masks, keys still to come, attention flags."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.data.records import DatasetSettings, SubsetSettings
from library.diffusion.schedule import make_schedule
from library.messages import UserError
from library.options.objective import ObjectiveConfig
from library.training.data_setup import refuse_not_yet, require_masks
from library.training.feed import DataFeed
from library.training.model_setup import choose_attention
from library.training.step import per_sample_loss


def losses(batch: dict, **options: object) -> torch.Tensor:
    feed = DataFeed.__new__(DataFeed)
    run = SimpleNamespace(
        noise_schedule=make_schedule(), objective=ObjectiveConfig(**options), v_prediction=False, feed=feed
    )
    ones = torch.ones(2, 4, 8, 8)
    return per_sample_loss(run, ones, torch.zeros_like(ones), torch.tensor([1, 500]), batch)


@pytest.mark.parametrize("options", [{}, {"masked_loss": True}])
def test_alpha_masks_need_no_other_option(options: dict) -> None:
    mask = torch.ones(2, 64, 64)
    mask[1, :, :32] = 0
    torch.testing.assert_close(losses({"alpha_masks": mask}, **options), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(losses({}, **options), torch.ones(2))


def test_masked_loss_without_masks_is_refused() -> None:
    options = SimpleNamespace(objective=ObjectiveConfig(masked_loss=True))
    with pytest.raises(UserError, match="give --alpha_mask"):
        require_masks(options, (DatasetSettings(subsets=(SubsetSettings(image_dir="d"),)),))
    require_masks(options, (DatasetSettings(subsets=(SubsetSettings(image_dir="d", alpha_mask=True),)),))


@pytest.mark.parametrize("values", [{"validation_split": 0.1}, {"network_multiplier": 0.5}])
def test_keys_of_features_to_come_are_refused(values: dict) -> None:
    refuse_not_yet((DatasetSettings(),))
    with pytest.raises(UserError, match="not supported yet"):
        refuse_not_yet((DatasetSettings(), DatasetSettings(**values)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), "sdpa"),
        (("sdpa",), "sdpa"),
        (("mem_eff_attn",), "sdpa"),
        (("xformers",), "xformers"),
        (("xformers", "sdpa"), "xformers"),
        (("xformers", "mem_eff_attn"), "sdpa"),
    ],
)
def test_attention_flags(given: tuple[str, ...], expected: str) -> None:
    chosen = ["sdpa"]
    unet = SimpleNamespace(
        set_use_memory_efficient_attention=lambda x, m: chosen.append("xformers" if x and not m else "sdpa"),
        set_use_sdpa=lambda on: chosen.append("sdpa" if on else "plain"),
    )
    flags = {name: name in given for name in ("xformers", "mem_eff_attn", "sdpa")}
    options = SimpleNamespace(precision=SimpleNamespace(**flags))
    choose_attention(SimpleNamespace(unet=unet, vae=object()), options)
    assert chosen[-1] == expected
