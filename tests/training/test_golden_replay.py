"""Recorded runs of the network trainers on tiny models: the recorded batches and draws go through the real loop."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from library.options.parser import parse
from library.training import assemble, loop
from library.training.network_trainer import NetworkTrainer
from library.training.recipes.network import NetworkRecipe
from library.training.sdxl_network_trainer import SdxlNetworkTrainer
from tests.training.golden_replay import Recorded, RecordedDraws, Watch, compare_weights, fill_by_rule, tiny_models


class Replaying(NetworkTrainer):
    """Opens the tiny models and compares what the U-Net is given and each loss."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.vae_scale_factor = 1.0  # the recorded latents are scaled
        self.recorded = recorded
        self.micro = -1

    def load_target_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> tuple:
        encoders, vae, unet = tiny_models(self.is_sdxl)
        return self.family.version(False, False), encoders if len(encoders) > 1 else encoders[0], vae, unet

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


class SdxlReplaying(Replaying, SdxlNetworkTrainer):
    """The same for SDXL."""


CASES = {
    "network": ("train_network.py", Replaying),
    "sdxl_network": ("sdxl_train_network.py", SdxlReplaying),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_run(name: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, trainer_class = CASES[name]
    recorded = Recorded(golden, name)
    module = ModuleType("recorded_run")
    module.Batches = recorded.dataset_class()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorded_run", module)

    trainer = trainer_class(recorded)
    args = parse(script, recorded.argv(tmp_path))
    run = assemble.build_run(NetworkRecipe(trainer), args, draws=RecordedDraws(recorded))
    assert run is not None
    trainer.run = run
    watch = Watch(run, recorded)
    loop.train(run)

    watch.compare(recorded)
    ours = dict(run.target.network.named_parameters())
    assert ours.keys() == recorded.data["trained_after"].keys()
    compare_weights(ours, recorded.data["trained_after"])
    assert trainer.micro == len(recorded.steps) - 1
