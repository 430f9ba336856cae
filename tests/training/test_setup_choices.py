"""Options and data-set keys that act, or are refused: masks, keys still to come, attention flags."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.data.records import DatasetSettings, SubsetSettings
from library.diffusion.schedule import make_schedule
from library.messages import UserError
from library.options.effects import without_effect
from library.options.objective import ObjectiveConfig
from library.options.parser import parse, resolve
from library.training.data_setup import require_masks
from library.training.feed import DataFeed
from library.training.model_setup import choose_attention
from library.training.step import per_sample_loss
from library.training.targets.network import NetworkTarget
from library.training.write_back import effective_options


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
    options = SimpleNamespace(value={"masked_loss": True}.get, dataset=SimpleNamespace(dataset_config=None))
    with pytest.raises(UserError, match="conditioning_data_dir beside --train_data_dir"):
        require_masks(options, (DatasetSettings(subsets=(SubsetSettings(image_dir="d"),)),))
    for values in ({"alpha_mask": True}, {"conditioning_data_dir": "m"}):
        require_masks(options, (DatasetSettings(subsets=(SubsetSettings(image_dir="d", **values),)),))


class Network(torch.nn.Module):
    """A network that remembers its strengths."""

    def __init__(self) -> None:
        super().__init__()
        self.strengths: list[float] = []

    def set_multiplier(self, value: float) -> None:
        self.strengths.append(value)


def target_of(network: torch.nn.Module) -> NetworkTarget:
    target = NetworkTarget.__new__(NetworkTarget)
    target.network, target.multiplier, target.max_norm, target.step_hook = network, 1.0, None, None
    target.hooks = SimpleNamespace(overridden=lambda name: False)
    return target


def test_the_network_has_the_strength_of_the_data_set_and_is_whole_between_steps() -> None:
    network = Network()
    target = target_of(network)
    for strength in (1.0, 0.5, 0.5, 2.0):
        target.on_step_start({"network_multipliers": torch.full((2,), strength)})
        target.on_step_end()
    target.on_step_start({"network_multipliers": torch.full((2,), 3.0)})
    target.on_validation_batch_end({})
    target.on_step_start({})
    assert network.strengths == [0.5, 1.0, 0.5, 1.0, 2.0, 1.0, 3.0, 1.0]
    with pytest.raises(UserError, match="mixes"):
        target.on_step_start({"network_multipliers": torch.tensor([1.0, 0.5])})
    with pytest.raises(UserError, match="network_multiplier"):
        target_of(torch.nn.Linear(1, 1)).on_step_start({"network_multipliers": torch.tensor([0.5])})


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


def test_a_foreign_network_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    class Foreign:
        def state_dict(self) -> dict:
            return {}

        def save_weights(self, file: str, dtype: object, metadata: dict) -> None:
            Path(file).write_bytes(b"weights")
            if metadata.get("fails"):
                raise OSError(errno.ENOSPC, "No space left on device")

    target = NetworkTarget.__new__(NetworkTarget)
    target.network = Foreign()
    path = tmp_path / "new" / "net.safetensors"
    target.save(path, None, {}, epoch=1, step=1)
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="disk is full"):
        target.save(path, None, {"fails": "yes"}, epoch=1, step=2)
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]
    assert path.read_bytes() == b"earlier"


def test_values_that_assembly_writes_back_do_not_count_as_given() -> None:
    command = "--pretrained_model_name_or_path m --network_module n --output_dir o --train_data_dir d"
    args = parse("train_network.py", [*command.split(), "--max_train_epochs", "2"])
    asked = resolve(args)
    args.max_train_steps = 12
    effective = effective_options(args, asked)
    assert effective.loop.max_train_steps == 12
    assert "max_train_steps" not in effective.given
    assert not without_effect(effective)
