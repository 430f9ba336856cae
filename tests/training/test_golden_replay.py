"""A recorded run of the network trainer on tiny models: the recorded batches and draws go through the real loop."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.data.plan import EpochPlan, PlannedBatch
from library.models.dimensions import TextDimensions
from library.models.text_encoders import empty_text_encoder, exchanged_key, restore_buffers, text_config
from library.models.unet_config import UNetConfig
from library.models.unet_sd import from_config
from library.options.parser import parse
from library.train_util import MinimalDataset
from library.training import assemble, loop
from library.training.draws import Draws, Place
from library.training.network_trainer import NetworkTrainer
from library.training.recipes.network import NetworkRecipe

EPOCH = 4
UNET = UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=64)
TEXT = TextDimensions(64, 12, 128)


def fill_by_rule(module: nn.Module, name_of: Any = str) -> None:
    """Every parameter from a generator seeded with its name."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            name = name_of(key)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values + (parameter.dim() == 1 and name.endswith("weight")))


class Recorded:
    """The recorded run: what goes in, and what came out."""

    def __init__(self, folder: Path) -> None:
        self.data = json.loads((folder / "training_replay_network.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "training_replay_network.safetensors")
        self.steps: list[dict[str, Any]] = self.data["micro_steps"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def batch(self, micro: int) -> dict[str, Any]:
        names = ("latents", "input_ids", "loss_weights", "original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
        values = {name: self[f"{micro}.{name}"] for name in names}
        return {**values, "images": None, "captions": self.steps[micro]["captions"]}

    def argv(self, folder: Path) -> list[str]:
        """The recorded command line, with a data set that gives the recorded batches."""
        argv = [argument for argument in self.data["argv"] if argument != "--cache_latents"]
        for flag, value in (("--output_dir", str(folder / "out")), ("--logging_dir", None), ("--train_data_dir", None)):
            place = argv.index(flag)
            argv[place : place + 2] = [flag, value] if value else []
        place = argv.index("--reg_data_dir")
        del argv[place : place + 2]
        return [*argv, "--dataset_class", "recorded_run.Batches"]


class RecordedDraws(Draws):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__(0, torch.device("cpu"))
        self.recorded = recorded

    def noise(self, place: Place, latents: torch.Tensor, config: Any) -> torch.Tensor:
        return self.recorded[f"{micro_of(place)}.noise"]

    def timesteps(self, place: Place, count: int, config: Any) -> torch.Tensor:
        return torch.tensor(self.recorded.steps[micro_of(place)]["timesteps"])


def micro_of(place: Place) -> int:
    return (place.epoch - 1) * EPOCH + place.micro


class ReplayTrainer(NetworkTrainer):
    """Opens the tiny models and compares what the U-Net is given and each loss."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.vae_scale_factor = 1.0  # the recorded latents are scaled
        self.recorded = recorded
        self.micro = -1

    def load_target_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> tuple:
        from diffusers import AutoencoderKL

        unet = from_config(UNET)
        encoder = empty_text_encoder(text_config(TEXT)).to_empty(device="cpu")
        restore_buffers(encoder, "cpu")
        fill_by_rule(unet)
        fill_by_rule(encoder, exchanged_key)
        return "sd_v1", encoder, AutoencoderKL(block_out_channels=(32,)), unet

    def post_process_network(self, args: Any, accelerator: Any, network: nn.Module, *_: Any) -> None:
        fill_by_rule(network)

    def on_step_start(self, *_: Any, **__: Any) -> None:
        self.micro += 1

    def call_unet(self, args: Any, accelerator: Any, unet: Any, noisy_latents: torch.Tensor, *rest: Any) -> Any:
        wanted = self.recorded[f"{self.micro}.noisy_latents"]
        torch.testing.assert_close(noisy_latents, wanted, rtol=1e-5, atol=1e-6)
        return super().call_unet(args, accelerator, unet, noisy_latents, *rest)

    def post_process_loss(self, loss: torch.Tensor, *_: Any) -> torch.Tensor:
        assert loss.mean().item() == pytest.approx(self.recorded.steps[self.micro]["loss"], rel=1e-5), self.micro
        return loss


def test_recorded_run(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(golden)

    class Batches(MinimalDataset):
        def __len__(self) -> int:
            return EPOCH

        def __getitem__(self, index: int) -> dict[str, Any]:
            return recorded.batch((self.current_epoch - 1) * EPOCH + index)

    module = ModuleType("recorded_run")
    module.Batches = Batches  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorded_run", module)

    trainer = ReplayTrainer(recorded)
    args = parse("train_network.py", recorded.argv(tmp_path))
    run = assemble.build_run(NetworkRecipe(trainer), args, draws=RecordedDraws(recorded))
    assert run is not None
    trainer.run = run
    batches = tuple(PlannedBatch(0, (0, 0), (index,), (0,)) for index in range(EPOCH))
    run.feed.plan = lambda epoch: EpochPlan(epoch=epoch, seed=0, batches=(batches,))
    logs: list[tuple[dict[str, Any], int]] = []
    run.log.log_to = lambda values, step: logs.append((values, step))
    norms: list[float] = []
    watch = run.guard.watch
    run.guard.watch = lambda losses, norm, **rest: (norms.append(norm.item()), watch(losses, norm, **rest))[1]
    loop.train(run)

    assert norms == pytest.approx([step["grad_norm"] for step in recorded.steps if "grad_norm" in step], rel=1e-4)
    compare_logs(logs, recorded.data["logs"])
    compare_weights(dict(run.target.network.named_parameters()), recorded.data["trained_after"])
    assert trainer.micro == len(recorded.steps) - 1


def compare_logs(ours: list[tuple[dict[str, Any], int]], recorded: list[dict[str, Any]]) -> None:
    """Every recorded value; the count of scaled keys may differ by a few that lie at the limit."""
    assert [step for _, step in ours] == [entry["step"] for entry in recorded]
    for (values, _), entry in zip(ours, recorded, strict=True):
        assert entry["log"].keys() <= values.keys()
        for key, wanted in entry["log"].items():
            tolerance = {"abs": 25} if key.endswith("keys_scaled") else {"rel": 1e-5, "abs": 1e-9}
            assert values[key] == pytest.approx(wanted, **tolerance), key


def compare_weights(ours: dict[str, torch.Tensor], recorded: dict[str, list[float]]) -> None:
    """Sum and L2 norm of every trained parameter."""
    assert ours.keys() == recorded.keys()
    for name, (total, norm) in recorded.items():
        values = ours[name].detach().double()
        assert values.norm().item() == pytest.approx(norm, rel=1e-4), name
        assert values.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4), name
