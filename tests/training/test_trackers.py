"""Which trackers a run opens and what goes into them."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.messages import UserError
from library.options.logging import LoggingConfig
from library.training.trackers import choose_trackers, log_picture, loggable_options, start_trackers

NOON = time.struct_time((2024, 5, 6, 12, 0, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("options", "log_with", "folder"),
    [
        ({}, None, None),
        ({"logging_dir": "logs"}, "tensorboard", "logs/20240506120001"),
        ({"logging_dir": "logs", "log_prefix": "lora_"}, "tensorboard", "logs/lora_20240506120001"),
        ({"logging_dir": "logs", "log_with": "all"}, "all", "logs/20240506120001"),
    ],
)
def test_choice(options, log_with, folder):
    choice = choose_trackers(LoggingConfig(**options), NOON)
    assert (choice.log_with, choice.project_dir) == (log_with, folder)


@pytest.mark.parametrize("log_with", ["tensorboard", "all"])
def test_a_folder_is_needed(log_with):
    with pytest.raises(UserError, match="--logging_dir"):
        choose_trackers(LoggingConfig(log_with=log_with))


def test_wandb_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        choose_trackers(LoggingConfig(log_with="wandb"))


def test_wandb_signs_in_and_gets_its_folder(monkeypatch, tmp_path):
    keys = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=lambda key: keys.append(key)))
    monkeypatch.setenv("WANDB_DIR", "before")
    folder = tmp_path / "logs"
    config = LoggingConfig(log_with="wandb", wandb_api_key="secret", logging_dir=str(folder))
    assert choose_trackers(config, NOON).log_with == "wandb"
    assert keys == ["secret"]
    assert folder.is_dir()
    import os

    assert os.environ["WANDB_DIR"] == str(folder)


class Accelerator:
    def __init__(self, main=True):
        self.is_main_process = main
        self.calls = []

    def init_trackers(self, name, config, init_kwargs):
        self.calls.append((name, config, init_kwargs))


def test_names_and_arguments(tmp_path):
    file = tmp_path / "trackers.toml"
    file.write_text('[wandb]\nname = "from file"\n[wandb.settings]\nx = 1\n', encoding="utf-8")
    accelerator = Accelerator()
    start_trackers(accelerator, LoggingConfig(), "network_train", {"seed": 1})
    config = LoggingConfig(log_tracker_name="mine", wandb_run_name="run", log_config=True, log_tracker_config=str(file))
    start_trackers(accelerator, config, "network_train", {"seed": 1, "output_dir": "/home/me"})
    assert accelerator.calls == [
        ("network_train", None, {}),
        ("mine", {"seed": 1}, {"wandb": {"name": "from file", "settings": {"x": 1}}}),
    ]
    other = Accelerator(main=False)
    start_trackers(other, config, "network_train")
    assert other.calls == []


@pytest.mark.parametrize("text", [None, "name = ", 'name = "x"'])
def test_bad_tracker_file(tmp_path, text):
    file = tmp_path / "trackers.toml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="log_tracker_config"):
        start_trackers(Accelerator(), LoggingConfig(log_tracker_config=str(file)), "x")


def test_options_are_logged_without_secrets_and_paths():
    options = {
        "learning_rate": 1e-4,
        "network_args": ["conv_dim=2"],
        "seed": None,
        "v2": False,
        "huggingface_token": "t",
        "wandb_api_key": "k",
        "train_data_dir": "/home/me/pictures",
    }
    assert loggable_options(options) == {"learning_rate": 1e-4, "network_args": "['conv_dim=2']", "v2": False}


def test_tensorboard_writes_what_is_logged(tmp_path):
    from accelerate import Accelerator as RealAccelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    choice = choose_trackers(LoggingConfig(logging_dir=str(tmp_path)))
    accelerator = RealAccelerator(cpu=True, log_with=choice.log_with, project_dir=choice.project_dir)
    options = {"learning_rate": 1e-4, "v2": False}
    start_trackers(accelerator, LoggingConfig(log_config=True), "network_train", options)
    accelerator.log({"loss/current": 1.5}, step=3)
    accelerator.end_training()
    folder = Path(choice.project_dir) / "network_train"
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/current")] == [(3, 1.5)]


def test_namespace_values_can_be_logged():
    assert loggable_options(vars(SimpleNamespace(a=(1, 2), b=0.5))) == {"a": "(1, 2)", "b": 0.5}


def test_sample_pictures_go_to_wandb(monkeypatch, tmp_path):
    logged = []

    class Tracker:
        def __init__(self, name):
            self.name = name

        def log(self, values, step=None, commit=True):
            logged.append((self.name, values, commit))

    accelerator = types.SimpleNamespace(trackers=[Tracker("tensorboard"), Tracker("wandb")])
    image = lambda path, caption: (path, caption)  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Image=image))
    path = tmp_path / "a.png"
    log_picture(accelerator, "sample_0", path, "a cat")
    log_picture(accelerator, "sample_0", path, "a cat", average=True)
    assert logged == [
        ("wandb", {"sample_0": (str(path), "a cat")}, False),
        ("wandb", {"sample_0_ema": (str(path), "a cat")}, False),
    ]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    log_picture(accelerator, "sample_0", path, "a cat")  # told, not raised
