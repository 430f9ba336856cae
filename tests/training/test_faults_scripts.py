"""A NaN in any script ends with the state before it, or is skipped; and every script says beforehand what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.messages import UserError, log
from library.models.family import family
from tests.training.runs import SCRIPTS, options_of, train

OTHERS = [script for script in SCRIPTS if script != "train_network.py"]
BACKWARD = ("--optimizer_type", "AdaFactor", "--fused_backward_pass")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Predictions are not finite at some calls of the U-Net."""

    def at(script: str, *calls: int) -> None:
        kind = type(family("sdxl" if script.startswith("sdxl") else "sd"))
        original, made = kind.predict, []

        def predict(self, *arguments, **options):
            made.append(1)
            prediction = original(self, *arguments, **options)
            return prediction * float("nan") if len(made) in calls else prediction

        monkeypatch.setattr(kind, "predict", predict)

    return at


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "x.safetensors")


def start(request: pytest.FixtureRequest, script: str, folder: Path, *more: str, steps: int = 3) -> list[str]:
    return options_of(script, request.getfixturevalue(f"tiny_{SCRIPTS[script][0]}"), folder, *more, steps=steps)


@pytest.mark.parametrize(
    ("script", "more"), [*((script, ()) for script in OTHERS), ("sdxl_train.py", BACKWARD), ("train_db.py", BACKWARD)]
)
def test_nan_stops_with_the_state_before_it(
    script: str, more: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path, poison
) -> None:
    train(script, start(request, script, tmp_path / "whole", *more))
    poison(script, 2)
    with pytest.raises(UserError, match=r"step 2: .*\.png.*timesteps") as stop:
        train(script, start(request, script, tmp_path / "bad", *more))
    assert not (tmp_path / "bad" / "x.safetensors").exists()
    state = next((tmp_path / "bad").glob("*-state"))
    assert str(state) in str(stop.value)
    assert '"kind": "end"' in (tmp_path / "bad" / "x-metrics.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "bad" / "x-report.html").exists()
    train(script, start(request, script, tmp_path / "rest", *more, "--resume", str(state)))
    whole, rest = weights(tmp_path / "whole"), weights(tmp_path / "rest")
    assert [name for name in whole if not torch.equal(whole[name], rest[name])] == []


@pytest.mark.parametrize("script", ["train_db.py", "train_textual_inversion.py"])
def test_nan_may_be_skipped(
    script: str, request: pytest.FixtureRequest, tmp_path: Path, poison, caplog: pytest.LogCaptureFixture
) -> None:
    log.propagate = True
    poison(script, 2)
    train(script, start(request, script, tmp_path, "--nan_policy", "skip"))
    assert "step 2 is left out" in caplog.text
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_and_disk_are_said(
    script: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log.propagate = True
    with caplog.at_level("INFO", logger=log.name):
        train(script, start(request, script, tmp_path, "--dry_run"))
    lines = [record.getMessage().strip() for record in caplog.records]
    assert any(line.startswith("memory: about ") for line in lines)
    assert any(line.startswith("saves: 1 x ") for line in lines)
