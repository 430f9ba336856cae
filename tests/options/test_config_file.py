"""Options in a TOML file: the original's cases where it was right, and this program's rules where it was not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import toml

from library import messages
from library.messages import UserError
from library.options.config_file import unknown_message
from library.options.parser import defaults, parse
from library.options.scripts import find_script

SCRIPT = "train_network.py"
CASES = json.loads((Path(__file__).parent.parent / "golden" / "training_config_file.json").read_text(encoding="utf-8"))[
    "cases"
]

# Cases whose recorded result shows a fault: index -> what happens here instead.
MENDED = {
    4: "is not a choice",  # mixed_precision = "nonsense" passed, learning_rate = "1e-4" stayed a text
    6: "is not true or false",  # shuffle_caption = "yes" passed
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(messages, "_said", set())
    return tmp_path


def write(text: str, name: str = "c.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def different(namespace: argparse.Namespace) -> dict:
    known = defaults(SCRIPT)
    return {
        k: v for k, v in vars(namespace).items() if k not in known or v != known[k] or type(v) is not type(known[k])
    }


@pytest.mark.parametrize("index", range(len(CASES)))
def test_recorded_case(index: int) -> None:
    case = CASES[index]
    if case["file"]:
        write(case["toml"], case["file"])
    if index in MENDED:
        with pytest.raises(UserError, match=MENDED[index]):
            parse(SCRIPT, case["argv"])
    elif case.get("exit") == 0:
        with pytest.raises(SystemExit) as end:
            parse(SCRIPT, case["argv"])
        assert end.value.code == 0
        for name, text in case["written"].items():
            assert Path(name).read_text(encoding="utf-8") == text
    elif "exit" in case or "error" in case:
        with pytest.raises(UserError):
            parse(SCRIPT, case["argv"])
    else:
        expected = dict(case["differs_from_default"])
        if "unet_lr" in expected:
            expected["unet_lr"] = float(expected["unet_lr"])  # an integer stayed one in a float option
        assert different(parse(SCRIPT, case["argv"])) == expected


def test_texts_are_read_as_on_the_command_line() -> None:
    name = write(
        'learning_rate = "1e-4"\nmax_train_steps = "20"\nxformers = "true"\nlr_warmup_steps = "10%"\n'
        "lr_decay_steps = 0.25\nnetwork_dim = 4.0\noutput_name = 12\nresolution = [512, 768]\nclip_skip = ''\n"
        'dataset_config = "sets/a.toml"\nnetwork_args = "conv_dim=4"\nbase_weights_multiplier = [1, "0.5"]\n'
    )
    args = parse(SCRIPT, ["--config_file", name])
    assert (args.learning_rate, args.max_train_steps, args.xformers) == (1e-4, 20, True)
    assert (args.lr_warmup_steps, args.lr_decay_steps, args.network_dim) == (0.1, 0.25, 4)
    assert isinstance(args.network_dim, int)
    assert (args.output_name, args.resolution, args.clip_skip) == ("12", "512,768", None)
    assert args.dataset_config == Path("sets/a.toml")
    assert args.network_args == ["conv_dim=4"]
    assert args.base_weights_multiplier == [1.0, 0.5]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("max_train_steps = 1.5", "a whole number"),
        ("max_train_steps = true", "a whole number"),
        ('learning_rate = "fast"', "a number"),
        ("xformers = 1", "true or false"),
        ("max_token_length = 100", "150, 225"),
        ('lr_warmup_steps = "1.0"', "a share such as 0.1"),
        ("output_name = [['a']]", "a text"),
        ("network_args = [{a = 1}]", "a text"),
    ],
)
def test_wrong_values_are_named(line: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(SCRIPT, ["--config_file", write(line + "\n")])
    assert "c.toml" in str(error.value)
    assert line.split(" ")[0] in str(error.value)
    assert words in str(error.value)


def test_the_command_line_wins_also_with_a_default() -> None:
    args = parse(SCRIPT, ["--config_file", write("max_train_steps = 5\nseed = 7\n"), "--max_train_steps", "1600"])
    assert (args.max_train_steps, args.seed) == (1600, 7)


def test_unknown_keys_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    name = write("lerning_rate = 1\nt5xxl = 'x'\nblocks_to_swap = 3\nzzz = 1\nseed = 3\n")
    args = parse(SCRIPT, ["--config_file", name])
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "lerning_rate (did you mean learning_rate?)" in warnings[0]
    assert "zzz" in warnings[0]
    assert "t5xxl, blocks_to_swap (of other model families, scripts or front ends)" in warnings[0]
    assert args.seed == 3


@pytest.mark.parametrize("key", ["lerning_rate", "t5xxl"])
def test_strict_stops_at_unknown_keys(key: str) -> None:
    with pytest.raises(UserError, match=key):
        parse(SCRIPT, ["--strict", "--config_file", write(f"{key} = 1\n")])


GUI = json.loads((Path(__file__).parent.parent / "spec" / "gui_keys.json").read_text(encoding="utf-8"))["scripts"]


def test_options_of_other_trainings_get_no_nearest_name() -> None:
    said = unknown_message(["network_dim", "learning_rat"], ["network_train", "learning_rate"])
    assert said == (
        "ignored, not options of this script: learning_rat (did you mean learning_rate?), network_dim (of other model "
        "families, scripts or front ends)"
    )


@pytest.mark.parametrize("script", GUI)
def test_every_key_of_the_front_end_is_an_option_or_known_as_foreign(
    script: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = {"bool": True, "int": 1, "float": 0.5, "str": "x", "list": ["1"], "Path": "x", None: "x"}
    here = {option.dest: option.value_type.__name__ for option in find_script(script).options()}  # more than it knows
    values = {k["key"]: (k.get("choices") or [samples[k.get("type") or here.get(k["key"])]])[-1] for k in GUI[script]}
    values |= {"config_file": "x", "output_config": False, "mixed_precision": "no"}
    for key in ("loss_type", "huber_schedule"):
        values.pop(key, None)
    parse(script, ["--config_file", write(toml.dumps(values))])
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].count("(") == 1, "a key of the front end is taken for a mistake"


def test_data_set_file_as_training_file() -> None:
    name = write("[general]\nresolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'\n")
    with pytest.raises(UserError, match="give it as --dataset_config"):
        parse(SCRIPT, ["--config_file", name])


def test_byte_order_mark_and_other_encodings() -> None:
    Path("bom.toml").write_bytes("\ufeffoutput_name = 'Müller'\n".encode())
    assert parse(SCRIPT, ["--config_file", "bom"]).output_name == "Müller"
    Path("latin.toml").write_bytes("output_name = 'Müller'\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        parse(SCRIPT, ["--config_file", "latin.toml"])


def test_windows_paths_get_a_remedy() -> None:
    with pytest.raises(UserError, match="single quotes"):
        parse(SCRIPT, ["--config_file", write('train_data_dir = "C:\\Users\\me"\n')])


def test_no_secret_is_written() -> None:
    with pytest.raises(SystemExit):
        parse(
            SCRIPT,
            [
                "--config_file",
                "o",
                "--output_config",
                "--huggingface_token",
                "t",
                "--wandb_api_key",
                "k",
                "--seed",
                "1",
            ],
        )
    assert toml.loads(Path("o.toml").read_text(encoding="utf-8")) == {"seed": 1}


def test_written_file_reads_back() -> None:
    given = ["--seed", "3", "--lr_warmup_steps", "10%", "--base_weights", "a", "b", "--dataset_config", "d.toml"]
    with pytest.raises(SystemExit):
        parse(SCRIPT, ["--config_file", "o", "--output_config", *given])
    again, direct = parse(SCRIPT, ["--config_file", "o"]), parse(SCRIPT, given)
    again.config_file = None
    assert vars(again) == vars(direct)
