"""Two processes (gloo, CPU): one result, and the one that a single process has with twice the batch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import options_of, train
from tests.two_processes import run_both

# Rounds of a bucket are not multiples of the batch, so the ranks' shares differ. SGD, because Adam makes a whole
# step of a gradient that rounding alone moves from zero.
VARIED = (
    *("--optimizer_type", "SGDNesterov", "--learning_rate", "0.1"),
    *("--noise_offset", "0.1", "--multires_noise_iterations", "3", "--ip_noise_gamma", "0.1", "--shuffle_caption"),
)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def test_two_processes_equal_one_with_twice_the_batch(command, tmp_path: Path) -> None:
    first, second = run_both("train_network.py", command(*VARIED, output="two", steps=10), tmp_path)
    assert largest_difference(first, second) == 0
    written = load_file(tmp_path / "two" / "x.safetensors")
    assert largest_difference(first, written) == 0

    train("train_network.py", command(*VARIED, "--train_batch_size", "4", output="one", steps=10))
    one = load_file(tmp_path / "one" / "x.safetensors")
    assert largest_difference(one, written) < 1e-5
    assert max(t.abs().max() for name, t in written.items() if "lora_up" in name) > 1e-3


def test_a_word_learned_by_two_processes(tiny_sd15: Path, tmp_path: Path) -> None:
    import train_textual_inversion_XTI

    def options(output: str, batch: int) -> list[str]:
        data = Path(__file__).parents[1] / "reference" / "data" / "ti"
        return [
            *("--pretrained_model_name_or_path", str(tiny_sd15), "--train_data_dir", str(data)),
            # of smaller pictures the deepest level has two values in a group norm: gradients of roundings
            *("--resolution", "128,128", "--enable_bucket", "--min_bucket_reso", "128", "--max_bucket_reso", "128"),
            *("--token_string", "zqx", "--init_word", "red", "--save_model_as", "safetensors", "--seed", "1"),
            *("--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_train_steps", "2"),
            *("--max_data_loader_n_workers", "0", "--output_dir", str(tmp_path / output)),
            *("--train_batch_size", str(batch)),
        ]

    first, second = run_both("train_textual_inversion_XTI.py", options("two", 2), tmp_path)
    assert largest_difference(first, second) == 0
    train_textual_inversion_XTI.train(train_textual_inversion_XTI.setup_parser().parse_args(options("one", 4)))
    one, two = (load_file(tmp_path / name / "zqx.safetensors") for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-5
    assert (two["IN01"] - two["OUT11"]).abs().max() > 1e-3, "nothing was learned"


FSDP = {"ACCELERATE_USE_FSDP": "true"}
SGD = ("--optimizer_type", "SGDNesterov", "--learning_rate", "1e-3")


def test_sharded_training_equals_one_process(tiny_sd15: Path, tmp_path: Path) -> None:
    """FSDP: weights cut over the processes, whole files, a state that resumes, sample pictures."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1", encoding="utf-8")
    more = (*SGD, "--train_batch_size", "1", "--sample_every_n_steps", "2", "--sample_prompts", str(prompts))
    saves = ("--save_every_n_steps", "2", "--save_state")
    two = options_of("train_db.py", tiny_sd15, tmp_path / "two", *more, *saves, steps=4)
    run_both("train_db.py", two, tmp_path / "ranks", FSDP)
    train("train_db.py", options_of("train_db.py", tiny_sd15, tmp_path / "one", *more, "--train_batch_size", "2"))
    one, written = (load_file(tmp_path / name / "x.safetensors") for name in ("one", "two"))
    assert largest_difference(one, written) < 1e-5
    assert len(list((tmp_path / "two" / "sample").iterdir())) == 2

    state = str(tmp_path / "two" / "x-step00000002-state")
    rest = options_of("train_db.py", tiny_sd15, tmp_path / "rest", *more, "--resume", state)
    run_both("train_db.py", rest, tmp_path / "ranks", FSDP)
    assert largest_difference(load_file(tmp_path / "rest" / "x.safetensors"), written) == 0


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_equals_one_process(stage: str, tiny_sd15: Path, tmp_path: Path) -> None:
    more = (*SGD, "--stop_text_encoder_training", "-1")
    zero = ("--train_batch_size", "1", "--deepspeed", "--zero_stage", stage)
    saves = ("--save_every_n_steps", "2", "--save_state")
    two = options_of("train_db.py", tiny_sd15, tmp_path / "two", *more, *zero, *saves)
    run_both("train_db.py", two, tmp_path / "ranks")
    train("train_db.py", options_of("train_db.py", tiny_sd15, tmp_path / "one", *more, "--train_batch_size", "2"))
    one, written = (load_file(tmp_path / name / "x.safetensors") for name in ("one", "two"))
    assert largest_difference(one, written) < 1e-5

    state = str(tmp_path / "two" / "x-step00000002-state")
    rest = options_of("train_db.py", tiny_sd15, tmp_path / "rest", *more, *zero, "--resume", state)
    run_both("train_db.py", rest, tmp_path / "ranks")
    assert largest_difference(load_file(tmp_path / "rest" / "x.safetensors"), written) == 0
