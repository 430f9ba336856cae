"""The benchmark of a training step runs, at a size that a CPU can do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.device_use import covered
from benchmarks.models import SHAPES
from benchmarks.train_step import SIDES, Setting

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]["sdxl"]


def test_every_ratio_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main(["ratios", "--size", "tiny", "--rounds", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines if not line.startswith("  ")] == ["sd", "sdxl"]
    works = re.findall(
        r"^  (\w+ \w+): ratio \d\.\d{3} \(this project \d+ ms, diffusers", "\n".join(lines), re.MULTILINE
    )
    assert works == ["lora step", "lora forward", "full step", "full forward"] * 2


def test_the_table_has_a_row_for_each_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    lines = [Setting(trained="lora", checkpointing=2), Setting(trained="full", checkpointing=1)]
    train_step.print_table(TINY, lines, CPU, rounds=1, peak=1e9)
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    assert head == list(train_step.COLUMNS)
    assert [row[:2] for row in rows] == [[str(line), side] for line in lines for side in SIDES]
    for row in rows:
        named = dict(zip(head, row, strict=True))
        assert float(named["s a step"]) > 0
        assert int(named["kernels"]) > 1000
        assert float(named["of the matrix peak"].rstrip("%")) > 0, "matrix products of both passes are counted"
    assert all(float(row[-1]) > 0 for row in rows[1::2])


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def too_large(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_step, "SIDES", {"this project": too_large})
    train_step.print_table(TINY, [Setting(trained="lora")], CPU, rounds=1, peak=None)
    assert "| this project | does not fit |" in capsys.readouterr().out


def test_every_setting_is_named() -> None:
    names = [str(setting) for setting in train_step.settings()]
    assert len(set(names)) == len(names) == 16
    assert [line.trained for line in train_step.settings(["full"])] == ["full"] * 4


@pytest.mark.parametrize("side", SIDES)
def test_blocks_are_handed_to_the_compiler(side: str) -> None:
    def compiled(setting: Setting) -> int:
        unet: nn.Module = SIDES[side](TINY, setting, CPU)[0].unet
        return sum(module._compiled_call_impl is not None for module in unet.modules())

    assert compiled(Setting(trained="full", compiled=True)) > 0
    assert compiled(Setting(trained="full")) == 0


def test_overlapping_spans_count_once() -> None:
    assert covered([(4, 6), (0, 2), (1, 3), (5, 5.5)]) == 5
    assert covered([]) == 0
