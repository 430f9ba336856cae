"""`library.config_util` as training programs of third parties use it."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest
import torch
import voluptuous
from PIL import Image

from library import config_util
from library.data.group import DatasetGroup

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "datasets_config.json").read_text(encoding="utf-8"))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("train/2_sks dog/a", "train/2_sks dog/b", "reg/1_dog/c"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
    return tmp_path


def namespace(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"train_batch_size": 2, "resolution": (64, 64), "max_token_length": 150, **values})


def test_every_name_resolves() -> None:
    for name in config_util.NAMES:
        assert getattr(config_util, name) is not None
    assert set(config_util.NAMES) == set(dir(config_util))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ConfigSanitizer", "support_dreambooth support_finetuning support_controlnet support_dropout"),
        ("BlueprintGenerator", "sanitizer"),
        ("generate_dataset_group_by_blueprint", "dataset_group_blueprint"),
        ("generate_dreambooth_subsets_config_by_subdirs", "train_data_dir reg_data_dir"),
        (
            "generate_controlnet_subsets_config_by_subdirs",
            "train_data_dir conditioning_data_dir caption_extension",
        ),
        ("load_user_config", "file"),
        ("add_config_arguments", "parser"),
    ],
)
def test_argument_names(name: str, arguments: str) -> None:
    assert list(inspect.signature(getattr(config_util, name)).parameters) == arguments.split()


def test_a_group_from_folders(folders: Path) -> None:
    subsets = config_util.generate_dreambooth_subsets_config_by_subdirs(str(folders / "train"), str(folders / "reg"))
    generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, False, True))
    blueprint = generator.generate({"datasets": [{"subsets": subsets}]}, namespace(prior_loss_weight=0.5))
    params = blueprint.dataset_group.datasets[0].params
    assert (params.batch_size, params.resolution, params.max_token_length) == (2, (64, 64), 150)
    assert params.prior_loss_weight == 0.5
    group = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    assert isinstance(group, DatasetGroup)
    assert isinstance(group.datasets[0], config_util.DreamBoothDataset)
    assert (group.num_train_images, group.num_reg_images, len(group)) == (4, 1, 4)
    subset = group.datasets[0].subsets[0]
    assert (subset.num_repeats, subset.class_tokens, subset.img_count) == (2, "sks dog", 2)


def test_runtime_values_reach_the_parameters(folders: Path) -> None:
    generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, False, False, True))
    user_config = {"general": {"resolution": 128}, "datasets": [{"subsets": [{"image_dir": str(folders)}]}]}
    tokenizer = object()
    blueprint = generator.generate(user_config, namespace(), tokenizer=tokenizer)
    assert blueprint.dataset_group.datasets[0].params.tokenizer is tokenizer
    assert blueprint.dataset_group.datasets[0].params.resolution == (128, 128)


@pytest.mark.parametrize(
    "case", [c for c in GOLDEN["refused"] if c["stage"] == "config" and c["config"]], ids=lambda c: c["reason"]
)
def test_bad_input_raises_voluptuous_errors_with_the_recorded_paths(case: dict, tmp_path: Path) -> None:
    path = tmp_path / f"c.{case['config_format']}"
    path.write_text(case["config"])
    flags = GOLDEN["scripts"][case["script"]]["config_support"]
    sanitizer = config_util.ConfigSanitizer(**{f"support_{kind}": given for kind, given in flags.items()})
    user_config = config_util.load_user_config(path)
    if "only known later" in case["reason"]:  # these keys belong to this program
        assert sanitizer.sanitize_user_config(user_config) == user_config
        return
    with pytest.raises(voluptuous.MultipleInvalid) as error:
        sanitizer.sanitize_user_config(user_config)
    found = [[str(step) for step in problem.path] for problem in error.value.errors]
    assert found == [detail["path"] for detail in case["details"]]


def test_options_that_cannot_be_read_are_invalid() -> None:
    sanitizer = config_util.ConfigSanitizer(True, False, False, True)
    with pytest.raises(voluptuous.Invalid):
        sanitizer.sanitize_argparse_namespace(namespace(resolution="big"))
    assert sanitizer.sanitize_argparse_namespace(namespace(resolution="640,448")).resolution == (640, 448)


def test_groups_of_the_other_kinds(folders: Path) -> None:
    pictures = folders / "train" / "2_sks dog"
    (folders / "meta.json").write_text(json.dumps({"a": {"caption": "x"}, "b": {"caption": "y", "tags": "t"}}))
    generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, True, True))
    subsets = [
        {"metadata_file": str(folders / "meta.json"), "image_dir": str(pictures), "num_repeats": 3},
        {"image_dir": str(pictures), "conditioning_data_dir": str(pictures)},
    ]
    user_config = {"datasets": [{"subsets": [subset]} for subset in subsets]}
    blueprint = generator.generate(user_config, namespace()).dataset_group
    assert [(one.is_dreambooth, one.is_controlnet) for one in blueprint.datasets] == [(False, False), (False, True)]
    group = config_util.generate_dataset_group_by_blueprint(blueprint)
    tuning, pairs = group.datasets
    assert isinstance(tuning, config_util.FineTuningDataset) and isinstance(pairs, config_util.ControlNetDataset)
    assert not isinstance(tuning, config_util.DreamBoothDataset) and not isinstance(
        pairs, config_util.FineTuningDataset
    )
    assert (tuning.num_train_images, tuning.tag_frequency) == (6, {"meta.json": {"t": 1}})
    assert {info.caption for info in tuning.image_data.values()} == {"x", "y, t"}
    assert {caption for position in range(len(tuning)) for caption in tuning[position]["captions"]} == {"x", "y, t"}
    batch = pairs[0]
    assert torch.equal(batch["images"], batch["conditioning_images"])


def test_fallbacks() -> None:
    generate = config_util.BlueprintGenerator.generate_params_by_fallbacks
    params = generate(config_util.DreamBoothDatasetParams, [{"batch_size": None}, {"train_batch_size": 4}])
    assert params.batch_size == 4
    assert config_util.BlueprintGenerator.search_value("a", [{}, {"a": None}, {"a": 0}], 7) == 0
    assert config_util.BlueprintGenerator.search_value("b", [{}], 7) == 7


def test_controlnet_tables(folders: Path) -> None:
    tables = config_util.generate_controlnet_subsets_config_by_subdirs(str(folders / "train"), "cond", ".caption")
    assert tables == [
        {
            "image_dir": str(folders / "train"),
            "conditioning_data_dir": "cond",
            "caption_extension": ".caption",
            "num_repeats": 1,
        }
    ]
    assert config_util.generate_controlnet_subsets_config_by_subdirs("gone", "cond") == []


def test_dataset_config_option() -> None:
    parser = argparse.ArgumentParser()
    config_util.add_config_arguments(parser)
    assert parser.parse_args(["--dataset_config", "a.toml"]).dataset_config == Path("a.toml")
