"""Parser, namespaces of third parties, and the resolved configs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from library import messages
from library.messages import UserError
from library.options.parser import build_parser, complete, defaults, parse, resolve
from library.options.scripts import SCRIPTS, find_script

ROOT = Path(__file__).parent.parent.parent
TRAIN = ["--pretrained_model_name_or_path", "m", "--network_module", "n", "--output_dir", "o", "--train_data_dir", "d"]


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_said", set())


def resolved(*argv: str):
    return resolve(parse("train_network.py", [*TRAIN, *argv]))


def test_resolved_configs() -> None:
    options = resolved("--max_train_steps", "5", "--lr_scheduler", "cosine")
    assert options.loop.max_train_steps == 5
    assert options.optimizer.lr_scheduler == "cosine"
    assert options.given >= {"max_train_steps", "lr_scheduler", "output_dir"}
    assert "seed" not in options.given
    assert options.value("output_dir") == "o"
    assert "network" in options
    assert "image" not in options
    with pytest.raises(AttributeError, match="image"):
        _ = options.image


def test_replace_makes_an_effective_copy() -> None:
    options = resolved()
    effective = options.replace(learning_rate=None, unet_lr=None, lr_scheduler="adafactor:0.1")
    assert effective.optimizer.learning_rate is None
    assert effective.optimizer.lr_scheduler == "adafactor:0.1"
    assert options.optimizer.lr_scheduler == "constant"


def test_hand_built_namespace(caplog: pytest.LogCaptureFixture) -> None:
    args = argparse.Namespace(
        pretrained_model_name_or_path="m", network_module="n", output_dir="o", train_data_dir="d", mystery=1
    )
    options = resolve(args)
    assert args.max_train_steps == options.loop.max_train_steps == 1600
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "mystery" in warnings[0]
    resolve(args)
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_values_are_written_back_for_hooks(caplog: pytest.LogCaptureFixture) -> None:
    args = parse("train_network.py", [*TRAIN, "--cache_latents_to_disk", "--caption_extention", ".txt"])
    options = resolve(args)
    assert args.cache_latents
    assert options.dataset.cache_latents
    assert (args.caption_extension, args.caption_extention) == (".txt", None)
    args.resolution = (512, 768)
    assert resolve(args).dataset.resolution == "512,768"


def test_the_parser_knows_what_was_given() -> None:
    parser = build_parser("train_network.py")
    args = parser.parse_args(["--max_train_steps", "1600", "--v2"])
    assert parser.given == {"max_train_steps", "v2"}
    assert vars(args) == {**defaults("train_network.py"), "v2": True}


def test_options_added_by_others_keep_their_defaults() -> None:
    parser = build_parser("train_network.py")
    parser.add_argument("--extra", type=int, default="7")
    parser.add_argument("--hidden", default=argparse.SUPPRESS)
    parser.set_defaults(seed=5)
    args = parser.parse_args([])
    assert (args.extra, args.seed) == (7, 5)
    assert not hasattr(args, "hidden")
    assert not parser.given


def test_lists_are_not_shared_between_parsers() -> None:
    first = complete(argparse.Namespace(), "gen_img_diffusers.py")
    assert first.network_mul is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "1"], "did you mean --learning_rate"),
        (["--max_train_steps", "many"], "invalid int"),
        (["--loss_type", "l3"], "invalid choice"),
        (["--lr_warmup_steps", "150%"], "invalid int_or_ratio"),
    ],
)
def test_errors_of_the_parser_are_one_line_and_exit_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        parse("train_network.py", argv)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert words in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_schema(script: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse(script, ["--dump_schema"])
    assert end.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    assert list(schema["properties"]) == [option.dest for option in find_script(script).options()]
    assert set(schema["required"]) <= set(schema["properties"])
    for name, entry in schema["properties"].items():
        kinds = {"type", "items"} & set(entry)
        assert kinds, name
        if entry["default"] is not None and "enum" in entry:
            assert entry["default"] in entry["enum"], name


def test_unknown_script() -> None:
    with pytest.raises(UserError, match=r"train_network\.py"):
        build_parser("train_netwerk.py")


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train_network.py"], 1, "--network_module"),
        (["gen_img_diffusers.py"], 1, "--ckpt"),
        (["train_network.py", "--seed", "x"], 2, "--seed"),
    ],
)
def test_doors_end_with_one_line(command: list[str], code: int, words: str) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
