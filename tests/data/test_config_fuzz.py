"""Thousands of damaged configurations, always the same ones: each is accepted, or refused with a message that names
the place, the key and the nearest name. No picture is read.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toml

from library.data import config_schema
from library.data.config import resolve_datasets
from library.data.config_schema import Support
from library.data.group import build_group
from library.data.sources import scan_all
from library.messages import UserError
from library.options.dataset import DatasetConfig
from library.options.parser import parse, resolve

COUNT, TEXT_COUNT, TRAINING_COUNT = 1400, 600, 400
SUPPORT = Support(dreambooth=True, finetuning=True)

FOLDERS = """
[general]
shuffle_caption = true
keep_tokens = 2
caption_extension = ".txt"
color_aug = false
caption_dropout_rate = 0.1
[[datasets]]
resolution = 512
batch_size = 4
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 960
bucket_reso_steps = 64
[[datasets.subsets]]
image_dir = "nowhere/a"
class_tokens = "sks girl"
num_repeats = 10
flip_aug = true
token_warmup_min = 1
token_warmup_step = 0.5
[[datasets.subsets]]
image_dir = "nowhere/b"
is_reg = true
face_crop_aug_range = [1.0, 3.0]
[[datasets]]
resolution = [768, 512]
validation_split = 0.1
[[datasets.subsets]]
image_dir = "nowhere/c"
caption_prefix = "a photo of"
resize_interpolation = "lanczos"
custom_attributes = { weight = 2 }
"""
METADATA = """
[general]
enable_bucket = true
bucket_no_upscale = false
[[datasets]]
resolution = 512
network_multiplier = 1.0
[[datasets.subsets]]
image_dir = "nowhere"
metadata_file = "nowhere/meta.json"
caption_tag_dropout_rate = 0.2
alpha_mask = true
"""
SMALL = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "nowhere"\n'
DATA_FILES = [FOLDERS, METADATA, SMALL]

TRAINING = """
[model]
pretrained_model_name_or_path = "m.safetensors"
v2 = false
clip_skip = 2
[data]
train_data_dir = "d"
resolution = "512,768"
enable_bucket = true
caption_extension = ".txt"
[training]
output_dir = "o"
output_name = "x"
max_train_steps = 100
learning_rate = 1e-4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=.9,.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 10
mixed_precision = "no"
seed = 1
min_snr_gamma = 5
[network]
network_module = "networks.lora"
network_dim = 8
network_alpha = 1
network_args = ["conv_dim=4"]
"""

# What a value may become.
ODD_VALUES: list[Any] = [
    *(True, False, 0, 1, -1, 2, 7, 63, 64, 100, 10**6, 10**30, 0.0, 0.5, -0.5, 1.5, 1e300, float("inf"), float("nan")),
    *("", "x", "512", "512,512", "1.0,3.0", "true", "a/b", "none", "\\u0000", "猫", "x" * 500),
    *([], [1], [512, 512], [1, 2, 3], [1.0, 3.0], [3.0, 1.0], ["a", "b"], [[]], {}, {"a": 1}, [{}], [{"a": 1}]),
]


def tables(config: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Every table of a configuration with the path to it."""
    if isinstance(config, dict):
        yield path, config
        for key, value in config.items():
            yield from tables(value, (*path, key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from tables(value, (*path, index))


def as_json(config: Any) -> str:
    return json.dumps(config, sort_keys=True)


def shown(path: tuple) -> str:
    """A path as messages write it."""
    return config_schema.Problem(path, "").place


def misspelled(key: str, draw: random.Random) -> str:
    """The key with one slip of the fingers."""
    at = draw.randrange(1, len(key))
    return draw.choice([key[:at] + key[at + 1 :], key[:at] + key[at - 1] + key[at:], key[:at] + "x" + key[at:]])


# Each gives what the message must hold if the result is refused, and whether it must be.
Change = Callable[[dict, random.Random], tuple[list[str], bool]]


def misspell(config: dict, draw: random.Random) -> tuple[list[str], bool]:
    path, table = draw.choice([(p, t) for p, t in tables(config) if t and p[-1:] != ("custom_attributes",)])
    key = draw.choice([key for key in table if len(key) > 3])
    wrong = misspelled(key, draw)
    if wrong in table:
        return [], False
    table[wrong] = table.pop(key)
    # below `datasets` misspelled, nothing else is looked at; a misspelled required key is told twice
    return [shown((*path, wrong)), f"did you mean {key}"], True


def other_value(config: dict, draw: random.Random) -> tuple[list[str], bool]:
    table = draw.choice([table for _, table in tables(config) if table])
    key = draw.choice(list(table))
    table[key] = copy.deepcopy(draw.choice(ODD_VALUES))
    return [], False


def misplace(config: dict, draw: random.Random) -> tuple[list[str], bool]:
    (source_path, source), (path, target) = draw.sample(list(tables(config)), 2)
    keys = [key for key, value in source.items() if not isinstance(value, (dict, list)) and key not in target]
    if not keys or path[-1:] == ("custom_attributes",) or source_path[-1:] == ("custom_attributes",):
        return [], False
    key = draw.choice(keys)
    target[key] = source.pop(key)
    return [], False


def invent(config: dict, draw: random.Random) -> tuple[list[str], bool]:
    path, table = draw.choice([(p, t) for p, t in tables(config) if p[-1:] != ("custom_attributes",)])
    key = draw.choice(["train_batch_size", "seed", "lr", "zzzzqqq", "subsets", "datasets", "general", "cache_latents"])
    if key in table:
        return [], False
    table[key] = draw.choice(ODD_VALUES)
    must = key in ("train_batch_size", "seed", "zzzzqqq", "cache_latents")
    return ([shown((*path, key))] if must else []), must


def drop(config: dict, draw: random.Random) -> tuple[list[str], bool]:
    _, table = draw.choice([(p, t) for p, t in tables(config) if t])
    del table[draw.choice(list(table))]
    return [], False


CHANGES: list[Change] = [misspell, other_value, misplace, invent, drop]


def outcome(path: Path, **options: Any) -> UserError | None:
    """None if a data-set file is accepted (down to the buckets), else the refusal; anything else fails the test."""
    try:
        settings = resolve_datasets(DatasetConfig(dataset_config=path, **options), support=SUPPORT)
        scans = scan_all(settings, skip_broken=True, check_pixels=False)
        build_group(settings, scans, tokenize=None, seed=1).plan(1, 1)
    except UserError as error:
        return error
    return None


def check_message(error: UserError, source: Path) -> None:
    """One line, or a line each below a head; the thing, and what to do about it."""
    lines = str(error).split("\n")
    assert len(lines) == 1 + len(error.details)
    assert all(line.strip() for line in lines)
    if error.details:
        assert str(source) in error.problem
        assert all(any(word in line for word in REMEDIES) for line in error.details), error.details
    else:
        assert error.remedy or any(word in error.problem for word in REMEDIES), error.problem


REMEDIES = ("must be", "did you mean", "unknown key", "is not allowed in", "is no key of a data-set file", "missing, ",
            "mixed", "instead of tables")  # fmt: skip


@pytest.mark.parametrize("part", range(7))
def test_damaged_data_set_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("data.toml")
    bases = [toml.loads(text) for text in DATA_FILES]
    refusals = 0
    for number in range(part, COUNT, 7):
        draw = random.Random(number)
        config = copy.deepcopy(draw.choice(bases))
        change = draw.choice(CHANGES)
        words, must = change(config, draw)
        path.write_text(toml.dumps(config), encoding="utf-8")
        if as_json(toml.loads(path.read_text(encoding="utf-8"))) != as_json(config):
            continue  # the writer of TOML lost or moved something
        error = outcome(path)
        assert error is not None or not must, (number, change.__name__, config)
        if error is None:
            continue
        refusals += 1
        check_message(error, path)
        assert all(word in str(error) for word in words), (number, words, str(error))
    assert refusals > 50


@pytest.mark.parametrize("part", range(3))
def test_damaged_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("data.toml")
    refusals = 0
    for number in range(part, TEXT_COUNT, 3):
        draw = random.Random(number)
        path.write_bytes(damaged(draw.choice(DATA_FILES).encode(), draw))
        error = outcome(path)
        if error is not None:
            refusals += 1
            assert str(path) in str(error) or "nowhere" in str(error) or error.remedy, str(error)
            check_message(error, path)
    assert refusals > 50


def damaged(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data))
        piece = draw.choice(
            [b"", b"=", b"[", b"]", b'"', b"'", b"\\", b"\n", b"#", b"\xff", b"\0", b"{", b",", b".", b"1"]
        )
        data = data[:at] + piece + data[at + draw.randint(0, 3) :]
    return data if draw.random() > 0.1 else data[: draw.randrange(len(data))]


def test_several_faults_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Misspelled keys in every table: all are told, each in its own line."""
    monkeypatch.chdir(tmp_path)
    for number in range(100):
        draw = random.Random(number)
        config = toml.loads(FOLDERS)
        places = set()
        for path, table in list(tables(config)):
            if not path or path[-1] == "custom_attributes" or draw.random() < 0.3:
                continue
            key = draw.choice([key for key in table if key not in ("subsets", "image_dir")])
            wrong = misspelled(key, draw)
            table[wrong] = table.pop(key)
            places.add((shown((*path, wrong)), f"did you mean {key}?"))
        if len(places) < 2:
            continue
        Path("data.toml").write_text(toml.dumps(config), encoding="utf-8")
        error = outcome(Path("data.toml"))
        assert error is not None and len(error.details) == len(places)
        assert all(any(place in line and hint in line for line in error.details) for place, hint in places)


def nearest_to(key: str) -> str:
    """The key that was meant, or its old spelling where a slip comes nearer to that."""
    return "caption_ext" if key == "caption_extension" else key


@pytest.mark.parametrize("part", range(4))
def test_damaged_training_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: int
) -> None:
    from library import messages

    monkeypatch.chdir(tmp_path)
    base = toml.loads(TRAINING)
    refusals = 0
    for number in range(part, TRAINING_COUNT, 4):
        draw = random.Random(number)
        config = copy.deepcopy(base)
        table = draw.choice([table for path, table in tables(config) if path])
        key, wrong = draw.choice([key for key in table if len(key) > 3]), None
        if draw.random() < 0.4:
            wrong = misspelled(key, draw)
            table[wrong] = table.pop(key)
        elif draw.random() < 0.8:
            table[key] = copy.deepcopy(draw.choice(ODD_VALUES))
        text = toml.dumps(config).encode()
        if wrong is None and draw.random() < 0.3:
            text = damaged(text, draw)
        Path("train.toml").write_bytes(text)
        strict = draw.random() < 0.5
        monkeypatch.setattr(messages, "_said", set())
        caplog.clear()
        try:
            resolve(parse("train_network.py", ["--config_file", "train.toml", *(["--strict"] if strict else [])]))
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and (error.remedy or "did you mean" in str(error)), str(error)
            if wrong is not None and wrong in str(error):
                assert key in str(error), str(error)
            continue
        assert wrong is None or not strict, (number, wrong)
        if wrong is not None:
            told = " ".join(record.getMessage() for record in caplog.records)
            assert f"{wrong} (did you mean {nearest_to(key)}" in told, (number, wrong, told)
    assert refusals > 20
