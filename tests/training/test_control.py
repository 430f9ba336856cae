"""Files that ask a running training to save or to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.messages import Interrupted
from library.training.network_trainer import NetworkTrainer
from library.training.record import read_record


class Asking(NetworkTrainer):
    """Puts a file into the output folder while the first step is made."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def call_unet(self, *arguments, **options):
        if self.run.position.step == 0:
            self.path.parent.mkdir(exist_ok=True)
            self.path.touch()
        return super().call_unet(*arguments, **options)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.logbook.FLUSH_EVERY", 2)


def test_save(train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x-stop").touch()  # of an earlier run
    out = train(steps=4, trainer=Asking(tmp_path / "out" / "x-save"))
    assert (out / "x-step00000002.safetensors").exists() and (out / "x-step00000002-state").is_dir()
    assert not (out / "x-save").exists() and len(list(out.glob("x-step*.safetensors"))) == 1


def test_stop(train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"stopped after step 2; go on with --resume .*x-step00000002-state"):
        train(steps=4, trainer=Asking(tmp_path / "out" / "x-stop"))
    assert not (tmp_path / "out" / "x-stop").exists()
    end = read_record(tmp_path / "out" / "x-metrics.jsonl")[-1]
    assert end["asked"] and end["problem"].startswith("stopped after step 2")
    whole = train(output="whole", steps=4)
    rest = train("--resume", str(tmp_path / "out" / "x-step00000002-state"), output="rest", steps=4)
    a, b = load_file(whole / "x.safetensors"), load_file(rest / "x.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)
