"""A bad run ends with one line, and leaves earlier files as they were."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from library.messages import Interrupted, UserError
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


@pytest.mark.parametrize("optimizer", ["AdamW", "SGDNesterov"])
def test_nan_stops_with_the_state_before_it(train, tmp_path: Path, optimizer: str) -> None:
    options = ("--optimizer_type", optimizer)
    with pytest.raises(UserError, match=r"step 3: .*\.png") as stop:
        train(*options, output="bad", trainer=Poisoned(3), steps=6)
    state = next(iter((tmp_path / "bad").glob("*-state")))
    assert str(state) in str(stop.value)
    assert not list((tmp_path / "bad").glob("*.safetensors"))

    from safetensors.torch import load_file

    whole = load_file(train(*options, output="whole", steps=6) / "x.safetensors")
    rest = load_file(train(*options, "--resume", str(state), output="rest", steps=6) / "x.safetensors")
    assert [key for key in whole if not torch.equal(whole[key], rest[key])] == []


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
