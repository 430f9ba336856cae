"""Pictures marked `diff_output_preservation` are to come out as the model draws them without the network."""

from __future__ import annotations

from pathlib import Path

import torch

from library.training.network_trainer import NetworkTrainer
from tests.training.conftest import PICTURES
from tests.training.test_resume import weights

DATA = """
[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{folder}"
  {attributes}
"""
MARKED = "custom_attributes = {diff_output_preservation = true}"


class Watching(NetworkTrainer):
    """Notes what the U-Net predicts, and at which strength of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, bool]] = []

    def post_process_network(self, args, accelerator, network, *rest) -> None:
        self.network = network

    def call_unet(self, *arguments, **options):
        self.seen.append((self.network.multiplier, torch.is_grad_enabled()))
        return super().call_unet(*arguments, **options)


def run(train, tmp_path: Path, attributes: str, **rest) -> Path:
    data = tmp_path / "data.toml"
    data.write_text(DATA.format(folder=PICTURES / "1_shape", attributes=attributes), encoding="utf-8")
    unset = ("--train_data_dir", "", "--dataset_config", str(data))
    return train(*unset, **rest)


def test_marked_pictures_ask_the_model_without_the_network(train, tmp_path: Path) -> None:
    trainer = Watching()
    out = run(train, tmp_path, MARKED, trainer=trainer, steps=2)
    assert trainer.seen == [(1.0, True), (0.0, False)] * 2
    assert trainer.network.multiplier == 1.0
    # a new network changes nothing, so there is nothing to learn from such pictures
    assert not any(tensor.any() for key, tensor in weights(out).items() if "lora_up" in key)


def test_other_pictures_do_not(train, tmp_path: Path) -> None:
    trainer = Watching()
    out = run(train, tmp_path, "", trainer=trainer, steps=2)
    assert trainer.seen == [(1.0, True)] * 2
    assert any(tensor.any() for key, tensor in weights(out).items() if "lora_up" in key)
