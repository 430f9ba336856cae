"""Two processes (gloo, CPU): one result, and the one that a single process has with twice the batch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

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


def test_two_processes_equal_one_with_twice_the_batch(command, train, tmp_path: Path) -> None:
    first, second = run_both("train_network.py", command(*VARIED, output="two", steps=10), tmp_path)
    assert largest_difference(first, second) == 0
    written = load_file(tmp_path / "two" / "x.safetensors")
    assert largest_difference(first, written) == 0

    one = load_file(train(*VARIED, "--train_batch_size", "4", output="one", steps=10) / "x.safetensors")
    assert largest_difference(one, written) < 1e-5
    assert max(t.abs().max() for name, t in written.items() if "lora_up" in name) > 1e-3
