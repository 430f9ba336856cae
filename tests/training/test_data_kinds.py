"""Trainings on every kind of data set, from options and from a data-set file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.messages import UserError
from tests.training.conftest import PICTURES

FOLDER = PICTURES / "1_shape"
NAMES = sorted(path.name for path in FOLDER.glob("*.png"))


def learned(folder: Path) -> bool:
    """Whether the network changed at all: its second matrices begin at zero."""
    return any(tensor.any() for name, tensor in load_file(folder / "x.safetensors").items() if "lora_up" in name)


def facts(folder: Path) -> dict[str, str]:
    with safe_open(folder / "x.safetensors", "pt") as file:
        return file.metadata()


def metadata_file(path: Path, **more: object) -> Path:
    entries = {str(FOLDER / name): {"caption": "a shape", "tags": "one, two", **more} for name in NAMES}
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def without(options: list[str], *names: str) -> list[str]:
    """The command without these options and their values."""
    for name in names:
        at = options.index(name)
        options = options[:at] + options[at + 2 :]
    return options


@pytest.fixture
def train_file(command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Train on a data-set file with this text."""

    def run(text: str, *options: str, steps: int = 2, left_out: tuple[str, ...] = ("--train_data_dir",)) -> Path:
        from library.options.parser import parse
        from library.training.network_trainer import NetworkTrainer

        (tmp_path / "data.toml").write_text(text, encoding="utf-8")
        own = [*without(command(steps=steps), *left_out), "--dataset_config", str(tmp_path / "data.toml"), *options]
        NetworkTrainer().train(parse("train_network.py", own))
        return tmp_path / "out"

    return run


def test_pictures_of_a_metadata_file(train: Callable[..., Path], tmp_path: Path) -> None:
    path = metadata_file(tmp_path / "meta.json")
    folder = train("--in_json", str(path), "--dataset_repeats", "2", steps=2)
    assert learned(folder)
    told = facts(folder)
    assert json.loads(told["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 2, "img_count": len(NAMES)}}
    assert json.loads(told["ss_tag_frequency"]) == {"meta.json": {"one": len(NAMES), "two": len(NAMES)}}


def test_training_sizes_of_metadata_need_no_resolution(train_file: Callable[..., Path], tmp_path: Path) -> None:
    path = metadata_file(tmp_path / "meta.json", train_resolution=[64, 96])
    text = f"[[datasets]]\n[[datasets.subsets]]\nmetadata_file = '{path}'\n"
    folder = train_file(text, "--cache_latents", left_out=("--train_data_dir", "--resolution"))
    (told,) = json.loads(facts(folder)["ss_datasets"])
    assert (told["is_dreambooth"], told["enable_bucket"], told["min_bucket_reso"]) == (False, True, None)
    assert told["bucket_info"]["buckets"] == {"0": {"resolution": [64, 96], "count": len(NAMES)}}


def test_kinds_are_mixed_in_a_file(train_file: Callable[..., Path], tmp_path: Path) -> None:
    path = metadata_file(tmp_path / "meta.json")
    text = f"""
[general]
batch_size = 2
[[datasets]]
network_multiplier = 0.5
[[datasets.subsets]]
image_dir = '{FOLDER}'
[[datasets]]
[[datasets.subsets]]
metadata_file = '{path}'
num_repeats = 2
[[datasets]]
is_validation = true
[[datasets.subsets]]
image_dir = '{FOLDER}'
"""
    folder = train_file(text)
    told = json.loads(facts(folder)["ss_datasets"])
    assert [(one["is_dreambooth"], one["num_train_images"]) for one in told] == [(True, 6), (False, 12)]
    assert learned(folder)


def test_a_network_of_no_strength_learns_nothing(train_file: Callable[..., Path]) -> None:
    text = f"[[datasets]]\nnetwork_multiplier = 0.0\n[[datasets.subsets]]\nimage_dir = '{FOLDER}'\n"
    assert not learned(train_file(text))


@pytest.fixture
def masks(tmp_path: Path) -> Callable[..., Path]:
    """A folder of masks of one grey for the first pictures."""

    def make(grey: int, count: int = len(NAMES)) -> Path:
        folder = tmp_path / "masks"
        folder.mkdir()
        for name in NAMES[:count]:
            with Image.open(FOLDER / name) as picture:
                Image.new("L", picture.size, grey).save(folder / name)
        return folder

    return make


def test_places_that_a_mask_leaves_out_are_not_learned(
    train: Callable[..., Path], masks: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "toolkit"):
        folder = train("--masked_loss", "--conditioning_data_dir", str(masks(0)), steps=2)
    assert not learned(folder)
    assert "mask used for 6 of 6 pictures" in caplog.text
    shown = sorted(path.name for path in (folder / "masks").iterdir())
    assert shown and all(name.startswith("x-") for name in shown)
    assert f"masks as they are used are shown in {folder / 'masks'}" in caplog.text


def test_masks_of_some_pictures_with_cached_latents(
    train_file: Callable[..., Path], masks: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    subset = f"image_dir = '{FOLDER}'\nconditioning_data_dir = '{masks(0, 2)}'\nflip_aug = true"
    with caplog.at_level("INFO", "toolkit"):
        folder = train_file(f"[[datasets]]\n[[datasets.subsets]]\n{subset}\n", "--masked_loss", "--cache_latents")
    assert learned(folder)
    assert "mask used for 2 of 6 pictures" in caplog.text and "trained without a mask" in caplog.text


def test_masked_loss_without_masks_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no data set has masks"):
        train("--masked_loss")
