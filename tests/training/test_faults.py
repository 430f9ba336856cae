"""A bad run ends with one line, and leaves earlier files as they were."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.messages import Interrupted, UserError, log
from library.training import guard
from library.training.network_trainer import NetworkTrainer


class Poisoned(NetworkTrainer):
    """Predicts NaN at one micro-step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def call_unet(self, *arguments, **options):
        self.calls += 1
        prediction = super().call_unet(*arguments, **options)
        return prediction * float("nan") if self.calls == self.at else prediction


def test_interrupt_saves_and_says_how_to_go_on(train, tmp_path: Path) -> None:
    class Signalled(NetworkTrainer):
        calls = 0

        def call_unet(self, *arguments, **options):
            self.calls += 1
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().call_unet(*arguments, **options)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after step 2; go on with --resume .*state"):
        train(trainer=Signalled())
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_weights_are_not_saved(train, tmp_path: Path) -> None:
    out = train(output="out", steps=1)
    before = (out / "x.safetensors").read_bytes()

    class Broken(NetworkTrainer):
        def post_process_network(self, args, accelerator, network, text_encoders, unet):
            self.network = network

        def sample_images(self, *arguments, **options):
            next(iter(self.network.parameters())).data.fill_(float("inf"))

    with pytest.raises(UserError, match="not finite"):
        train(output="out", steps=1, trainer=Broken())
    assert (out / "x.safetensors").read_bytes() == before


class Flaky(NetworkTrainer):
    """Predicts NaN at some micro-steps."""

    def __init__(self, at: range) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def call_unet(self, *arguments, **options):
        self.calls += 1
        prediction = super().call_unet(*arguments, **options)
        return prediction * float("nan") if self.calls in self.at else prediction


UPDATES = {
    "AdamW": ("--optimizer_type", "AdamW"),
    "SGDNesterov": ("--optimizer_type", "SGDNesterov"),
    "Lion": ("--optimizer_type", "Lion"),
    "AdamW in the backward pass": ("--optimizer_type", "AdamW", "--fused_backward_pass"),
    "AdaFactor in the backward pass": ("--optimizer_type", "AdaFactor", "--fused_backward_pass"),
    "bfloat16": ("--optimizer_type", "AdamW", "--mixed_precision", "bf16", "--full_bf16"),
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_nan_may_be_skipped(train, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]) -> None:
    """The bad update is left out, the run goes on, and its losses stay numbers."""
    log.propagate = True
    skip = (*options, "--nan_policy", "skip")
    with caplog.at_level("INFO", logger=log.name):
        whole = load_file(train(*skip, output="whole", steps=3) / "x.safetensors")
        assert "is left out" not in caplog.text
        flaky = load_file(train(*skip, output="flaky", steps=3, trainer=Flaky(range(1, 3))) / "x.safetensors")
    lines = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert [line.partition(" is")[0] for line in lines] == ["step 1", "step 2"]
    assert ".png" in lines[0]
    assert "timesteps" in lines[0]
    assert all(tensor.isfinite().all() for tensor in flaky.values())
    ups = [key for key in flaky if "lora_up" in key]
    assert any(flaky[key].any() for key in ups)
    assert any(not torch.equal(flaky[key], whole[key]) for key in ups)


def test_too_many_skipped_updates_stop_the_run(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_IN_A_ROW", 3)
    with pytest.raises(UserError, match=r"step 5: .*\.png"):
        train("--nan_policy", "skip", output="bad", steps=20, trainer=Flaky(range(3, 99)))
    state = next(iter((tmp_path / "bad").glob("*-state")))
    assert all(tensor.isfinite().all() for tensor in load_file(state / "weights.safetensors").values())


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_nan_stops_every_kind_of_update(train, tmp_path: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"step 3: .*\.png") as stop:
        train(*options, output="bad", trainer=Poisoned(3), steps=4)
    state = next(iter((tmp_path / "bad").glob("*-state")))
    assert str(state) in str(stop.value)
    assert not list((tmp_path / "bad").glob("*.safetensors"))
    whole = load_file(train(*options, output="whole", steps=4) / "x.safetensors")
    rest = load_file(train(*options, "--resume", str(state), output="rest", steps=4) / "x.safetensors")
    assert [key for key in whole if not torch.equal(whole[key], rest[key])] == []
