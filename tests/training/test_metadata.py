"""Metadata of network files against complete files of the original."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.data import sources
from library.data.config import resolve_datasets
from library.data.group import build_group
from library.data.records import DatasetSettings, SubsetSettings
from library.data.support import SUPPORT
from library.options.parser import parse, resolve
from library.train_util import MinimalDataset
from library.training import metadata
from library.training.data_metadata import common_resolution, config_file_metadata, facts_of, single_dataset_metadata
from library.training.network_setup import parse_network_args
from library.training.optimizers import make_optimizer
from tests.conftest import GOLDEN, load_json

DATA = load_json(GOLDEN / "training_metadata.json")
RUNS = DATA["runs"]
# Written with the tensors, where the file is made (tests of the networks and of the checkpoint writer).
WITH_THE_TENSORS = {"sshs_model_hash", "sshs_legacy_hash"}
# Keys of later versions of the original, written always.
LATER_KEYS = {
    f"ss_{name}"
    for name in [
        "num_validation_images",
        "debiased_estimation",
        "noise_offset_random_strength",
        "ip_noise_gamma_random_strength",
        "loss_type",
        "huber_schedule",
        "huber_scale",
        "huber_c",
        "fp8_base",
        "fp8_base_unet",
        "validation_seed",
        "validation_split",
        "max_validation_steps",
        "validate_every_n_epochs",
        "validate_every_n_steps",
        "resize_interpolation",
    ]
}
# This program's own.
OWN_KEYS = {"ss_dataset_manifest_hash"}
LATER_DATASET_KEYS = {"resize_interpolation"}
LATER_SUBSET_KEYS = {
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "resize_interpolation",
}
PLACEHOLDERS = {
    "<ISO local time, whole seconds>": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d",
    "<float seconds>": r"\d+\.\d+",
    "LoRA@<float seconds>": r"LoRA@\d+\.\d+",
    "<integer 0..2^32>": r"\d+",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The pictures, captions and model files that the recorded runs had; the working folder is the one with them."""

    def picture(path, size):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(file)
        return file

    picture("train/1_cat/b0.png", (64, 64))
    for i, width in enumerate((80, 96, 112)):
        file = picture(f"train/2_sks dog/a{i}.png", (width, 64))
        file.with_suffix(".txt").write_text(f"sks dog, sitting, Tag{i}, sitting")
    for i in range(2):
        picture(f"reg/1_dog/r{i}.png", (64, 96))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/base model.safetensors").write_bytes(bytes(i % 251 for i in range(1114889)))
    (tmp_path / "m/v.pt").write_bytes(b"small vae")
    for i, height in enumerate((64, 96, 128)):
        picture(f"ft/c{i}.png", (64, height))
    (tmp_path / "meta.json").write_text(json.dumps(DATA["meta.json"]), encoding="utf-8")
    (tmp_path / "ds.toml").write_text(DATA["ds.toml"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "git_revision", lambda: "(unknown)")
    return tmp_path


def command(name):
    """Arguments of a recorded run that this script has."""
    text = RUNS["step_save" if name == "step_last" else name]["command"].partition("   (")[0]
    return [*shlex.split(text)[2:], "--output_dir", "out"]


def datasets(options):
    settings = resolve_datasets(options.dataset, support=SUPPORT[options.script])
    group = build_group(settings, [sources.scan(one, seed=42) for one in settings], tokenize=None, seed=42)
    return group.datasets, len(group.plan(42, 1))


def written(name):
    """What our file of this run says."""
    script = "sdxl_train_network.py" if name == "sdxl" else "train_network.py"
    namespace = parse(script, command(name))
    options = resolve(namespace, script)
    built = make_optimizer([torch.nn.Parameter(torch.ones(2, 2))], options.optimizer)
    effective = built.effective_config
    options = options.replace(learning_rate=effective.learning_rate, lr_scheduler=effective.lr_scheduler)
    members, batches = datasets(options)
    arguments = None
    if options.network.network_args:
        arguments = {**parse_network_args(options.network.network_args), "dropout": options.network.network_dropout}
    version = "sdxl_base_v1-0" if name == "sdxl" else "sd_v2_v" if options.model.v2 else "sd_v1"
    facts = metadata.RunFacts(
        session_id=123,
        started_at=1.5,
        seed=42,
        base_model_version=version,
        optimizer=built.name,
        optimizer_args=built.args_text,
        batches_per_epoch=batches,
        epochs=1,
        max_train_steps=options.loop.max_train_steps,
        scale_weight_norms=options.network.scale_weight_norms,
        network_args=arguments,
    )
    texts = metadata.network_metadata(options, facts, members)
    step_save = name == "step_save"
    texts |= metadata.progress_metadata(0 if step_save else 1, 2 if step_save else options.loop.max_train_steps, 2.5)
    if options.network.no_metadata:
        texts = metadata.minimum_metadata(texts)
    spec = metadata.modelspec_for_network(
        namespace, is_sdxl=name == "sdxl", resolution=common_resolution(members), timestamp=1700000000.25
    )
    return {**texts, **spec}


def without_later_keys(text):
    """`ss_datasets` as 0.7.0 has it."""
    result = json.loads(text)
    for dataset in result:
        for key in LATER_DATASET_KEYS:
            del dataset[key]
        for subset in dataset["subsets"]:
            for key in LATER_SUBSET_KEYS:
                del subset[key]
    return json.dumps(result)


@pytest.mark.parametrize("name", RUNS)
def test_golden(name, folder):
    expected = RUNS[name]["metadata"]
    ours = written(name)
    assert set(expected) - WITH_THE_TENSORS - set(ours) == set()
    assert set(ours) - set(expected) - OWN_KEYS == (set() if name == "no_metadata" else LATER_KEYS)
    assert (set(ours) >= OWN_KEYS) == (name != "no_metadata")
    if "ss_datasets" in ours:
        ours["ss_datasets"] = without_later_keys(ours["ss_datasets"])
    wrong = []
    for key, value in expected.items():
        if key in WITH_THE_TENSORS:
            continue
        if value in PLACEHOLDERS:
            if not re.fullmatch(PLACEHOLDERS[value], ours[key]):
                wrong.append((key, value, ours[key]))
        elif ours[key] != value:
            wrong.append((key, value, ours[key]))
    assert wrong == []


def test_resolution_comes_from_the_data_sets_when_they_agree(folder):
    """The recorded run says 512x512 with `--dataset_config` whatever the data sets say."""
    namespace = parse("train_network.py", command("config"))
    assert namespace.resolution is None

    def said(*sizes):
        sets = [SimpleNamespace(settings=DatasetSettings(resolution=size), **EMPTY) for size in sizes]
        spec = metadata.modelspec_for_network(namespace, is_sdxl=False, resolution=common_resolution(sets))
        return spec["modelspec.resolution"]

    assert said((128, 128), (128, 128)) == "128x128"
    assert said((128, 192)) == "128x192"
    assert said((128, 128), (192, 128)) == "512x512"


EMPTY = {"image_counts": [], "num_train_images": 0, "num_reg_images": 0, "tag_frequency": {}, "bucket_info": None}


def test_trailing_slash_is_stripped(folder):
    """The original writes an empty name."""
    subset = SubsetSettings(image_dir="train/2_sks dog/", num_repeats=2)
    dataset = SimpleNamespace(
        settings=DatasetSettings(resolution=(64, 64), subsets=(subset,)), **{**EMPTY, "image_counts": [3]}
    )
    texts = config_file_metadata([facts_of(dataset)])
    assert json.loads(texts["ss_dataset_dirs"]) == {"2_sks dog": {"n_repeats": 2, "img_count": 3}}
    assert json.loads(texts["ss_datasets"])[0]["min_bucket_reso"] is None


def test_a_folder_as_base_model(folder):
    (folder / "diffusers").mkdir()
    namespace = parse("train_network.py", [*command("step_save"), "--pretrained_model_name_or_path", "diffusers/"])
    texts = metadata._base_files(resolve(namespace))
    assert texts == {
        "ss_sd_model_name": "diffusers",
        "ss_sd_model_hash": "IsADirectory",
        "ss_new_sd_model_hash": "IsADirectory",
    }


def test_minimum_metadata_from_values():
    texts = metadata.build_minimum_network_metadata(True, "sd_v2", "networks.lora", 4, None, {"conv_dim": "2"})
    assert texts == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_args": '{"conv_dim": "2"}',
    }


def test_git_revision_is_a_commit_or_unknown():
    assert re.fullmatch(r"[0-9a-f]{40}|\(unknown\)", metadata.git_revision())


def test_a_foreign_data_set_takes_the_single_form():
    """`--dataset_class` gives an object that stands for group, data set and subset at once."""
    options = resolve(parse("train_network.py", [*command("step_save"), "--dataset_class", "a.B"]))
    facts = facts_of(MinimalDataset(None, None, (128, 64)))
    texts = single_dataset_metadata(options, 2, facts)
    assert texts["ss_dataset_dirs"] == '{"dummy": {"n_repeats": 1, "img_count": 1}}'
    assert texts["ss_resolution"] == (128, 64)
    assert texts["ss_total_batch_size"] == 4
    assert texts["ss_min_bucket_reso"] is None
