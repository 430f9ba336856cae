"""What other programs assign to old module names is what a training calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import library.config_util
import library.sdxl_train_util
import library.train_util
from library.replaceable import REPLACEABLE
from library.training import classic_config

DATASETS = """
[[datasets]]
resolution = [96, 96]
batch_size = 2
[[datasets.subsets]]
image_dir = "{folder}"
caption_extension = ".txt"
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[tuple, dict]]]:
    """Every replaceable name is recorded and handed on to the program's own function."""
    seen: dict[str, list[tuple[tuple, dict]]] = {}

    def spy(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, []).append((args, kwargs))
            return own(*args, **kwargs)

        return function

    for module, names in REPLACEABLE.items():
        porch = getattr(library, module)
        for name in names:
            monkeypatch.setattr(porch, name, spy(name, getattr(porch, name)))
    return seen


def test_every_name_is_called(calls: dict, train: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    folder = Path(__file__).parents[1] / "reference" / "data" / "train" / "1_shape"
    file.write_text(DATASETS.format(folder=folder.as_posix()), encoding="utf-8")
    options = ("--dataset_config", str(file), "--save_every_n_steps", "1", "--loss_type", "huber", "--cache_latents")
    out = train(*options, steps=2)
    assert set(calls) == {n for module, names in REPLACEABLE.items() if module != "sdxl_train_util" for n in names}
    (args, extension, step), _ = calls["get_step_ckpt_name"][0]
    assert (args.output_name, extension, step) == ("x", ".safetensors", 1)
    (prediction, target), named = calls["conditional_loss"][0]
    assert prediction.shape == target.shape
    assert (named["reduction"], named["loss_type"], named["huber_c"].shape) == ("none", "huber", (2,))
    (blueprint,), _ = calls["generate_dataset_group_by_blueprint"][0]
    assert blueprint.datasets[0].params.batch_size == 2
    with safe_open(out / "x.safetensors", "pt") as opened:
        (dataset,) = json.loads(opened.metadata()["ss_datasets"])
    assert dataset["num_train_images"] == 6
    assert dataset["subsets"][0]["image_dir"] == "1_shape"


def test_same_weights_as_without(calls: dict, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that only hand on change nothing (but for the group: other data sets draw in their own order)."""
    own_group = classic_config.generate_dataset_group_by_blueprint
    monkeypatch.setattr(library.config_util, "generate_dataset_group_by_blueprint", own_group)
    replaced = train(output="replaced", steps=2) / "x.safetensors"
    assert set(calls) == {"load_tokenizer", "_load_target_model", "conditional_loss"}
    monkeypatch.undo()
    own = train(output="own", steps=2) / "x.safetensors"
    with safe_open(replaced, "pt") as one, safe_open(own, "pt") as two:
        assert [key for key in one.keys() if not one.get_tensor(key).equal(two.get_tensor(key))] == []  # noqa: SIM118


def test_names_that_are_given_are_used(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.train_util, "get_step_ckpt_name", lambda args, ext, step: f"mine-{step}{ext}")
    out = train("--save_every_n_steps", "2", steps=4)
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "mine-2.safetensors", "mine-4.safetensors", "x.safetensors"
    ]  # fmt: skip


def test_sdxl_names_are_called(calls: dict, train_sdxl: Callable[..., Path]) -> None:
    """An SDXL training asks for SDXL's functions and not for those of SD."""
    train_sdxl(steps=1)
    assert set(REPLACEABLE["sdxl_train_util"]) <= set(calls)
    assert not {"load_tokenizer"} & set(calls)
    (source, vae, version, *_), _ = calls["_load_target_model"][0]
    assert (Path(source).is_file(), vae, version) == (True, None, "sdxl_base_v1-0")
