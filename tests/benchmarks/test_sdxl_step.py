"""The SDXL benchmark runs, at a size that a CPU can do."""

from __future__ import annotations

import torch

from benchmarks import sdxl_step


def test_both_sides_make_a_step() -> None:
    setting = sdxl_step.Setting(batch=1, checkpointing=2)
    for make in sdxl_step.SUBJECTS.values():
        seconds, _, kernels = sdxl_step.measure(make, "tiny", setting, torch.device("cpu"), 1)
        assert seconds > 0 and kernels > 1000


def test_every_setting_is_named() -> None:
    names = [str(setting) for setting in sdxl_step.settings()]
    assert len(set(names)) == len(names) == 12
