"""Recorded runs of the scripts that train whole models, on tiny models, through the real loop."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from library.models.family import LoadedModel
from library.models.text_encoders import exchanged_key
from library.options.parser import parse
from library.training import assemble, loop
from library.training.recipes.model import DreamBoothRecipe, FineTuneRecipe, SdxlModelRecipe
from library.training.recipes.recipe import Setup
from tests.training.golden_replay import Recorded, RecordedDraws, Watch, compare_weights, tiny_models

# case -> recipe, and names of the modules in the recorded weights
CASES: dict[str, tuple[type, tuple[str, ...]]] = {
    "db": (DreamBoothRecipe, ("unet", "te")),
    "finetune": (FineTuneRecipe, ("unet", "te")),
    "sdxl": (SdxlModelRecipe, ("unet", "te1", "te2")),
    "sdxl_block": (SdxlModelRecipe, ("unet", "te1", "te2")),
}
# The original divides the sum of an epoch that the end of the run cuts by its full length.
CUT_EPOCHS = {"finetune", "sdxl"}


def replaying(base: type, recorded: Recorded) -> Any:
    """A recipe that opens the tiny models and compares what the U-Net is given and each loss."""

    class Replaying(base):
        def open_model(self, setup: Setup) -> LoadedModel:
            encoders, vae, unet = tiny_models(len(setup.tokenizers) > 1)
            return LoadedModel(text_encoders=encoders, vae=vae, unet=unet, tokenizers=setup.tokenizers)

        def scale_latents(self, args: Any, latents: torch.Tensor) -> torch.Tensor:
            return latents  # the recorded ones are scaled

        def make_target(self, setup: Setup) -> Any:
            target = super().make_target(setup)
            target.predict = watched(target.predict, recorded)
            return target

    return Replaying()


def watched(predict: Any, recorded: Recorded) -> Any:
    micro = iter(range(len(recorded.steps)))

    def compared(noisy_latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        wanted = recorded[f"{next(micro)}.noisy_latents"]
        torch.testing.assert_close(noisy_latents, wanted, rtol=1e-5, atol=1e-6)
        return predict(noisy_latents, *rest)

    return compared


@pytest.mark.parametrize("name", CASES)
def test_recorded_run(name: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, names = CASES[name]
    recorded = Recorded(golden, name)
    module = ModuleType("recorded_run")
    module.Batches = recorded.dataset_class()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorded_run", module)

    recipe = replaying(base, recorded)
    args = parse(recipe.script, recorded.argv(tmp_path))
    run = assemble.build_run(recipe, args, draws=RecordedDraws(recorded))
    assert run is not None
    compare_groups(run, recorded)
    watch = Watch(run, recorded)
    run.saver.at_end = lambda run: None  # the tiny VAE fits no file format
    loop.train(run)

    watch.compare(recorded, epoch_losses=name not in CUT_EPOCHS)
    model = run.target.model
    for part, module in zip(names, (model.unet, *model.text_encoders), strict=True):
        ours = {exchanged_key(key) if part != "unet" else key: p for key, p in module.named_parameters()}
        compare_weights(ours, recorded.data["after"][part])


def compare_groups(run: Any, recorded: Recorded) -> None:
    """Rates and sizes of the optimizer's groups; parameters on which nothing depends are left out here."""
    model = run.target.model
    trained = run.target.rates.trains_text
    idle = run.target.family.idle_parameters(model.text_encoders, run.target.clip_skip) if trained else []
    groups = run.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in recorded.data["param_groups"]]
    for index, (ours, theirs) in enumerate(zip(groups, recorded.data["param_groups"], strict=True)):
        left_out = idle if index == 0 else []
        assert len(ours["params"]) + len(left_out) == theirs["tensors"]
        assert sum(p.numel() for p in [*ours["params"], *left_out]) == theirs["numel"]
