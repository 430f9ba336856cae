"""Writes the trained thing and state folders when they are due, and removes what is older than the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import log
from library.options.hub import HubConfig
from library.replaceable import replacement
from library.runtime.precision import save_dtype
from library.training import saving
from library.training.ema import marked_name
from library.training.hub import Uploads
from library.training.optimizers import set_training
from library.training.state import save_state

if TYPE_CHECKING:
    from library.options.saving import SavingConfig
    from library.training.run import Run

Metadata = Callable[["Run", int], dict[str, str]]


class Saver:
    """Saving of one run.

    Args:
        config: names, intervals, windows, precision.
        extension: of the files; empty for folders.
        main: this is the process that writes.
        metadata: (run, epoch number to state) -> metadata of the file; None for none.
        hub: uploads.
        live: the caller's namespace, where hooks may change the intervals while the run goes.
    """

    def __init__(
        self,
        config: SavingConfig,
        *,
        extension: str,
        main: bool,
        metadata: Metadata | None = None,
        hub: HubConfig | None = None,
        live: Any = None,
    ) -> None:
        self.options = config
        self.extension = extension
        self.main = main
        self.metadata = metadata
        self.uploads = Uploads(hub or HubConfig())
        self.live = live
        self.files = saving.SavedFiles()

    @property
    def config(self) -> SavingConfig:
        """The options as they are now."""
        if self.live is None:
            return self.options
        names = ("save_every_n_steps", "save_every_n_epochs")
        return replace(self.options, **{name: getattr(self.live, name) for name in names})

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir or ".")

    def after_update(self, run: Run) -> None:
        config, step = self.config, run.position.step
        if not saving.due_after_step(config, step):
            return
        run.processes.barrier()
        # sd-scripts states the zero-based epoch at a step save; readers of old files expect it
        with run.log.aside(run):
            self._save(run, self._step_name(step), "step", step, run.position.epoch - 1)
            if config.save_state:
                self._save_state(run, saving.step_state_name(config.output_name, step), "step", step)
        self._remove("step", saving.oldest_step_to_go(config, step), saving.oldest_step_to_go(config, step, state=True))

    def after_epoch(self, run: Run, epoch: int) -> None:
        config = self.config
        if not saving.due_after_epoch(config, epoch, run.epochs):
            return
        with run.log.aside(run):
            self._save(run, saving.epoch_name(config.output_name, epoch, self.extension), "epoch", epoch, epoch)
            if config.save_state:
                self._save_state(run, saving.epoch_state_name(config.output_name, epoch), "epoch", epoch)
        self._remove(
            "epoch", saving.oldest_epoch_to_go(config, epoch), saving.oldest_epoch_to_go(config, epoch, state=True)
        )

    def at_end(self, run: Run) -> None:
        """State, if asked for, then the final file; waits for uploads."""
        if saving.state_due_at_end(self.options):
            self._save_state(run, saving.last_state_name(self.options.output_name), None, 0)
        epochs = run.position.epoch - (run.position.micro == 0)
        self._save(run, saving.last_name(self.options.output_name, self.extension), None, 0, epochs)
        if self.main:
            self.uploads.wait()

    def save_now(self, run: Run) -> None:
        """The result and the state, named after the step, because somebody asked for them."""
        step = run.position.step
        run.processes.barrier()
        with run.log.aside(run):
            self._save(run, self._step_name(step), "step", step, run.position.epoch - 1)
            self._save_state(run, saving.step_state_name(self.options.output_name, step), "step", step)

    def save_state_now(self, run: Run) -> Path:
        """A state folder named after the step, whatever the options say; for stops."""
        name = saving.step_state_name(self.options.output_name, run.position.step)
        self._save_state(run, name, None, 0)
        return self.folder / name

    def files_written(self) -> list[dict[str, Any]]:
        return self.files.to_data()

    def adopt_files(self, files: list[dict[str, Any]]) -> None:
        """Go on with the record of the run that is resumed."""
        self.files = saving.SavedFiles.from_data(files)

    def _step_name(self, step: int) -> str:
        foreign = replacement("train_util", "get_step_ckpt_name")
        if foreign is not None and self.live is not None:
            return foreign(self.live, self.extension, step)
        return saving.step_name(self.options.output_name, step, self.extension)

    def _save(self, run: Run, name: str, kind: saving.Kind | None, number: int, epoch: int) -> None:
        if not self.main and not run.parallel.spread:
            return
        self._write(run, self.folder / name, kind, number, epoch)
        if run.ema:
            with run.ema.in_place():
                self._write(run, self.folder / marked_name(name, self.extension), kind, number, epoch)

    def _write(self, run: Run, path: Path, kind: saving.Kind | None, number: int, epoch: int) -> None:
        log.info("saving %s", path)  # only the first process speaks
        set_training(run.optimizer, False)
        metadata = self.metadata(run, epoch) if self.metadata else {}
        run.target.save(path, save_dtype(self.options.save_precision), metadata, epoch=epoch, step=run.position.step)
        set_training(run.optimizer, True)
        if not self.main:
            return
        run.log.event(run, "save", path=path.name)
        if kind is not None:
            self.files.add(path, kind, number)
        self.uploads.send(path, last=kind is None)

    def _save_state(self, run: Run, name: str, kind: saving.Kind | None, number: int) -> None:
        if not self.main and not run.parallel.spread:
            return
        path = self.folder / name
        if kind is not None:
            self.files.add(path, kind, number, state=True)
        log.info("saving the state %s", path)
        save_state(run, path)
        if self.main:
            self.uploads.send_state(path)

    def _remove(self, kind: saving.Kind, number: int | None, state_number: int | None) -> None:
        if self.main:
            self.files.remove_until(kind, number, busy=self.uploads.is_busy)
            self.files.remove_until(kind, state_number, state=True, busy=self.uploads.is_busy)
