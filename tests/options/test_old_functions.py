"""Old functions that other programs build their parsers and namespaces with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from library import config_util, messages, train_util, utils
from library.messages import UserError
from library.options import groups

ORIGINAL = json.loads((Path(__file__).parent.parent / "spec" / "options.json").read_text(encoding="utf-8"))
# Of options that come with later scripts.
NOT_IN_GROUPS = {"train_db.py": {"no_token_padding", "stop_text_encoder_training", "save_model_as", "use_safetensors"}}


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_said", set())


def original_order(parser: argparse.ArgumentParser, script: str) -> list[str]:
    known = {option["dest"] for option in ORIGINAL[script]}
    return [action.dest for action in parser._actions if action.dest in known]


def test_groups_give_the_original_options_in_their_order() -> None:
    parser = argparse.ArgumentParser()
    train_util.add_sd_models_arguments(parser)
    train_util.add_dataset_arguments(parser, True, True, True)
    train_util.add_training_arguments(parser, True)
    train_util.add_optimizer_arguments(parser)
    config_util.add_config_arguments(parser)
    groups.add_custom_train_arguments(parser)
    recorded = [option["dest"] for option in ORIGINAL["train_network.py"]]
    assert original_order(parser, "train_network.py") == recorded[: recorded.index("no_metadata")]


def test_groups_without_dreambooth_or_metadata() -> None:
    parser = argparse.ArgumentParser()
    train_util.add_sd_models_arguments(parser)
    train_util.add_dataset_arguments(parser, True, False, True)
    train_util.add_training_arguments(parser, True)
    train_util.add_optimizer_arguments(parser)
    config_util.add_config_arguments(parser)
    groups.add_custom_train_arguments(parser, True)
    recorded = [o["dest"] for o in ORIGINAL["train_db.py"] if o["dest"] not in NOT_IN_GROUPS["train_db.py"]]
    assert original_order(parser, "train_db.py") == recorded

    parser = argparse.ArgumentParser()
    train_util.add_dataset_arguments(parser, False, True, False)
    present = {action.dest for action in parser._actions}
    assert "in_json" in present
    assert not present & {"reg_data_dir", "caption_dropout_rate"}
    parser = argparse.ArgumentParser()
    groups.add_custom_train_arguments(parser, support_weighted_captions=False)
    assert "weighted_captions" not in {action.dest for action in parser._actions}


def test_an_option_that_is_there_stays() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss_type", default="mine")
    train_util.add_training_arguments(parser, True)
    assert parser.parse_args([]).loss_type == "mine"


def test_later_groups() -> None:
    parser = argparse.ArgumentParser()
    utils.add_logging_arguments(parser)
    train_util.add_masked_loss_arguments(parser)
    groups.add_deepspeed_arguments(parser)
    args = parser.parse_args(["--masked_loss", "--console_log_simple"])
    assert args.masked_loss
    assert args.console_log_simple
    assert args.zero_stage == 2


def test_read_config_from_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("learning_rate = '1e-4'\nmine = 3\nseed = 7\nother = 1\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    train_util.add_training_arguments(parser, True)
    train_util.add_optimizer_arguments(parser)
    parser.add_argument("--mine", type=float)
    args = parser.parse_args(["--config_file", str(file), "--seed", "1"])
    merged = train_util.read_config_from_file(args, parser)
    assert (merged.learning_rate, merged.mine, merged.seed, merged.other) == (1e-4, 3.0, 1, 1)
    assert args.learning_rate == 2e-6
    assert merged.config_file == str(tmp_path / "c")
    args.config_file = None
    assert train_util.read_config_from_file(args, parser).learning_rate == 2e-6


def test_own_parsers_know_what_was_given(tmp_path: Path) -> None:
    import train_network

    file = tmp_path / "c.toml"
    file.write_text("max_train_steps = 5\nseed = 7\n", encoding="utf-8")
    parser = train_network.setup_parser()
    args = parser.parse_args(["--config_file", str(file), "--max_train_steps", "1600"])
    merged = train_util.read_config_from_file(args, parser)
    assert (merged.max_train_steps, merged.seed) == (1600, 7)


def test_verify_training_args(caplog: pytest.LogCaptureFixture) -> None:
    args = argparse.Namespace(cache_latents_to_disk=True, cache_latents=False, v_parameterization=True, v2=False)
    train_util.verify_training_args(args)
    assert args.cache_latents
    assert len(caplog.records) == 2
    args.v_pred_like_loss = 0.5
    with pytest.raises(UserError, match="--v_pred_like_loss"):
        train_util.verify_training_args(args)


def test_tokens_on_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    train_util.verify_command_line_training_args(argparse.Namespace(wandb_api_key=None))
    assert not caplog.records
    train_util.verify_command_line_training_args(argparse.Namespace(wandb_api_key="secret"))
    assert "--wandb_api_key" in caplog.text
    assert "secret" not in caplog.text


def test_prepare_dataset_args(caplog: pytest.LogCaptureFixture) -> None:
    args = argparse.Namespace(
        caption_extention=".txt",
        caption_extension=".caption",
        resolution="512",
        face_crop_aug_range="1.0,3.0",
        in_json="m.json",
        color_aug=True,
        random_crop=False,
    )
    train_util.prepare_dataset_args(args, True)
    assert (args.caption_extension, args.caption_extention) == (".txt", None)
    assert args.resolution == (512, 512)
    assert args.face_crop_aug_range == (1.0, 3.0)
    assert "--in_json" in caplog.text


def test_fire_in_thread() -> None:
    import threading

    done = threading.Event()
    utils.fire_in_thread(lambda *, event: event.set(), event=done)
    assert done.wait(10)
