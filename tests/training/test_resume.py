"""A run that is stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

VARIED = (
    *("--shuffle_caption", "--caption_dropout_rate", "0.3", "--caption_tag_dropout_rate", "0.2", "--flip_aug"),
    *("--network_dropout", "0.2", "--noise_offset", "0.1", "--lr_warmup_steps", "4"),
    *("--gradient_accumulation_steps", "2"),
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "x.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("workers", ["0", "2"])
def test_stopped_twice_equals_uninterrupted(train, workers: str) -> None:
    # 3 micro-steps an epoch, 2 to an update: 2 updates an epoch; step 3 is the middle of the second epoch
    options = (*VARIED, "--lr_scheduler", "constant_with_warmup", "--max_data_loader_n_workers", workers)
    whole = weights(train(*options, output="whole", steps=6))

    state = str(train(*options, "--save_state", output="a", steps=3) / "x-state")
    train(*options, "--save_state", "--resume", state, output="b", steps=5)
    parts = weights(train(*options, "--resume", state.replace("/a/", "/b/"), output="c", steps=6))
    assert_equal(whole, parts)


def test_workers_do_not_change_the_run(train) -> None:
    options = (*VARIED, "--lr_scheduler", "linear")
    a = weights(train(*options, output="a"))
    b = weights(train(*options, "--max_data_loader_n_workers", "2", output="b"))
    assert_equal(a, b)


def test_sample_pictures_do_not_change_the_run(train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2", encoding="utf-8")
    a = weights(train(output="a"))
    b = weights(train("--sample_every_n_steps", "2", "--sample_prompts", str(prompts), output="b"))
    assert_equal(a, b)
    assert len(list((tmp_path / "b" / "sample").glob("*.png"))) == 2


def test_another_seed_is_refused_in_the_middle_of_an_epoch(train) -> None:
    from library.messages import UserError

    out = train("--save_state", "--save_every_n_steps", "1", steps=2)
    with pytest.raises(UserError, match="--seed is 2, was 1"):
        train("--seed", "2", "--resume", str(out / "x-step00000001-state"), output="b")
