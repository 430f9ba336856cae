"""How much room the files of a run will take, looked at before the first step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.messages import log
from library.runtime.files import check_room, format_bytes
from library.runtime.precision import save_dtype
from library.training.memory_need import moments_bytes
from library.training.saving import state_due_at_end

if TYPE_CHECKING:
    from collections.abc import Iterable

    from library.options.parser import Resolved
    from library.options.saving import SavingConfig
    from library.training.run import Run


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What the run writes and keeps.

    Attributes:
        file, state: bytes of one written file and of one state folder.
        files, states: most that lie there at once.
        free: bytes that are free.
    """

    file: int
    state: int
    files: int
    states: int
    free: int

    @property
    def total(self) -> int:
        return self.file * self.files + self.state * self.states

    def describe(self) -> str:
        """One line."""
        states = f" and {self.states} x {format_bytes(self.state)} of states" if self.states else ""
        return (
            f"saves: {self.files} x {format_bytes(self.file)}{states}, about {format_bytes(self.total)} in all; "
            f"{format_bytes(self.free)} free"
        )


def disk_need(run: Run, options: Resolved) -> DiskNeed:
    """Sizes from the shapes of what is written."""
    saving = options.saving
    file = _size(run.target.written_tensors(), save_dtype(saving.save_precision))
    state = _size(run.target.state_dict().values(), None)
    state += moments_bytes(run.target.trainable_parameters(), options)
    state += _size(run.ema.averages, None)
    files, states = _kept(saving, run.max_steps, run.epochs, state=False), 0
    if saving.save_state:
        states = _kept(saving, run.max_steps, run.epochs, state=True)
    return DiskNeed(
        file=file,
        state=state,
        files=(files + 1) * (2 if run.ema else 1),
        states=states + state_due_at_end(saving),
        free=shutil.disk_usage(_existing(Path(saving.output_dir or "."))).free,
    )


def require_room(need: DiskNeed, folder: str) -> None:
    """Stop if not even one file fits, warn if not all do.

    Raises:
        UserError: one file, or one with its state, does not fit.
    """
    check_room(folder, need.file + (need.state if need.states else 0))
    if need.total > need.free:
        log.warning(
            "the files of this run need about %s, and %s are free in %s: save less often, or keep fewer with "
            "--save_last_n_epochs or --save_last_n_steps",
            format_bytes(need.total),
            format_bytes(need.free),
            folder,
        )


def _kept(saving: SavingConfig, steps: int, epochs: int, *, state: bool) -> int:
    """Saves on the way that lie there at once."""
    count = 0
    if saving.save_every_n_steps:
        every = saving.save_every_n_steps
        window = (saving.save_last_n_steps_state if state else None) or saving.save_last_n_steps
        made = steps // every
        count += made if window is None else min(made, window // every + 2)  # the old one goes after the new one came
    if saving.save_every_n_epochs:
        window = (saving.save_last_n_epochs_state if state else None) or saving.save_last_n_epochs
        made = max(0, (epochs - 1) // saving.save_every_n_epochs)
        count += made if window is None else min(made, window + 1)
    return count


def _size(tensors: Iterable[torch.Tensor], dtype: torch.dtype | None) -> int:
    return sum(
        tensor.numel() * (dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors
    )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
