"""Files by which a user asks a running training for something: `NAME-save` and `NAME-stop` in its output folder.

They are looked for when the log is written, every ten updates or so, and removed when they are answered. Their content
does not matter. For programs that cannot send Ctrl-C, and for machines that are reached by their disk only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.messages import log

if TYPE_CHECKING:
    from library.runtime.processes import Processes
    from library.training.run import Run

SAVE, STOP = "-save", "-stop"


class ControlFiles:
    """Looks for the files of one run.

    Args:
        folder: the output folder; None looks for nothing.
        name: output name of the run.

    Attributes:
        stop: the run was asked to save its state and end.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self.paths = () if folder is None else (folder / f"{name}{SAVE}", folder / f"{name}{STOP}")
        self.stop = False

    def start(self, run: Run) -> None:
        """Forget what an earlier run was asked for and did not answer."""
        if run.processes.is_main:
            for path in self.paths:
                if path.exists():
                    path.unlink()

    def after_flush(self, run: Run) -> None:
        """Answer what is asked for; the log has just been written, else nothing is looked for."""
        if not self.paths or run.log.entries:
            return
        save, self.stop = self._asked(run.processes)
        if save:
            run.saver.save_now(run)

    def _asked(self, processes: Processes) -> tuple[bool, bool]:
        """The same on every process: what one of them sees counts."""
        seen = [float(path.exists()) for path in self.paths]
        if processes.count > 1:
            seen = processes.reduce_mean(torch.tensor(seen, device=processes.device)).tolist()
        for path, there in zip(self.paths, seen, strict=True):
            if there and processes.is_main:
                log.info("asked by %s", path)
                path.unlink(missing_ok=True)
        return seen[0] > 0, seen[1] > 0
