"""Machine-independent numbers of a step: kernels and host reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.counting import count
from benchmarks.host_reads import reads_per_update
from benchmarks.kernels import own_kernels
from benchmarks.startup import help_of, scripts
from library.training.logbook import FLUSH_EVERY
from tests.training.runs import SCRIPTS, options_of, train

# Of SD 1.5 on meta tensors with torch 2.13; other versions decompose attention there in another way.
COUNTED_WITH = "2.13"
KERNELS_WITHOUT_ADAPTERS = 827
KERNELS_OF_A_STEP = 3165


def test_counter_counts_kernels_not_views() -> None:
    a, b = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)
    forward = count(lambda: (a @ b).view(2, 8).t()[0].unsqueeze(0).expand(3, 2))
    assert forward.ops == {"aten::mm": 1}
    assert forward.host_reads == 0
    both = count(lambda: (a @ b).sum().backward())
    assert both.ops["aten::mm"] == 2, "the backward pass is counted too"


@pytest.mark.parametrize(
    ("read", "number"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: float(x[0]) + float(x[1]), 2),
        (lambda x: x.nonzero().shape, 0),
        (lambda x: x + 1, 0),
    ],
)
def test_counter_counts_host_reads(read, number: int) -> None:
    assert count(lambda: read(torch.ones(3))).host_reads == number


def test_an_adapted_module_adds_two_kernels() -> None:
    counts = own_kernels()
    assert counts["modules"] == 192
    assert counts["added per module"] <= 2
    if torch.__version__.startswith(COUNTED_WITH):
        assert counts["forward without adapters"] <= KERNELS_WITHOUT_ADAPTERS
        assert counts["forward and backward"] <= KERNELS_OF_A_STEP


# Kind of what is trained: (script, options); accumulation doubles the micro-steps of an update.
QUIET = {
    "LoRA": ("train_network.py", ()),
    "LoRA, accumulation": ("train_network.py", ("--gradient_accumulation_steps", "2")),
    "LoRA, checkpointing and average": ("train_network.py", ("--gradient_checkpointing", "--ema_decay", "0.9")),
    "model": ("train_db.py", ()),
    "model, updates in the backward pass": ("sdxl_train.py", ("--fused_backward_pass",)),
    "embedding": ("train_textual_inversion.py", ()),
}


@pytest.mark.parametrize(("script", "options"), QUIET.values(), ids=QUIET)
def test_a_quiet_step_reads_nothing_from_the_device(
    script: str, options: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"tiny_{SCRIPTS[script][0]}")
    reads = reads_per_update(lambda: train(script, options_of(script, model, tmp_path, *options, steps=8)))
    assert len(reads) == 7 < FLUSH_EVERY
    # An epoch of the six pictures has three batches; at its end the log is written and the next loader starts.
    assert reads.count(0) >= len(reads) // 2
    assert max(reads) <= 1


@pytest.mark.parametrize("script", scripts())
def test_help_imports_nothing_heavy(script: str) -> None:
    assert help_of(script) == (0, [])
