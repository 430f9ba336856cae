"""What written files are called, when they are due, and which older ones go."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.messages import UserError, log

if TYPE_CHECKING:
    from library.options.saving import SavingConfig

EPOCH_FILE_NAME = "{}-{:06d}"
EPOCH_DIFFUSERS_DIR_NAME = EPOCH_FILE_NAME
EPOCH_STATE_NAME = "{}-{:06d}-state"
STEP_FILE_NAME = "{}-step{:08d}"
STEP_DIFFUSERS_DIR_NAME = STEP_FILE_NAME
STEP_STATE_NAME = "{}-step{:08d}-state"
LAST_STATE_NAME = "{}-state"
DEFAULT_EPOCH_NAME = "epoch"
DEFAULT_STEP_NAME = "at"
DEFAULT_LAST_OUTPUT_NAME = "last"

Kind = Literal["epoch", "step"]


def epoch_name(output_name: str | None, epoch: int, ext: str = "") -> str:
    """File (or, without ending, folder) written after epoch `epoch`, from 1."""
    return EPOCH_FILE_NAME.format(_or_default(output_name, DEFAULT_EPOCH_NAME), epoch) + ext


def step_name(output_name: str | None, step: int, ext: str = "") -> str:
    """File (or, without ending, folder) written after update `step`."""
    return STEP_FILE_NAME.format(_or_default(output_name, DEFAULT_STEP_NAME), step) + ext


def last_name(output_name: str | None, ext: str = "") -> str:
    """File (or, without ending, folder) written at the end."""
    return _or_default(output_name, DEFAULT_LAST_OUTPUT_NAME) + ext


def epoch_state_name(output_name: str | None, epoch: int) -> str:
    """State folder written after epoch `epoch`, from 1."""
    return EPOCH_STATE_NAME.format(_or_default(output_name, DEFAULT_EPOCH_NAME), epoch)


def step_state_name(output_name: str | None, step: int) -> str:
    """State folder written after update `step`."""
    return STEP_STATE_NAME.format(_or_default(output_name, DEFAULT_STEP_NAME), step)


def last_state_name(output_name: str | None) -> str:
    """State folder written at the end."""
    return LAST_STATE_NAME.format(_or_default(output_name, DEFAULT_LAST_OUTPUT_NAME))


def network_extension(config: SavingConfig) -> str:
    """Ending of network files: that of `--save_model_as`; none given means safetensors."""
    return f".{config.save_model_as or 'safetensors'}"


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """Form of a written model.

    Attributes:
        stability_layout: one file; else a diffusers folder.
        safetensors: else pickles.
    """

    stability_layout: bool = True
    safetensors: bool = True

    @property
    def extension(self) -> str:
        """Ending of the file; empty for a folder."""
        return model_extension(self.safetensors) if self.stability_layout else ""


def model_format(save_model_as: str | None, *, use_safetensors: bool, from_stability_layout: bool) -> ModelFormat:
    """What `--save_model_as` and `--use_safetensors` ask for; without the first, the layout of the source."""
    if save_model_as is None:
        return ModelFormat(from_stability_layout, use_safetensors)
    return ModelFormat(save_model_as in ("ckpt", "safetensors"), use_safetensors or "safetensors" in save_model_as)


def model_extension(use_safetensors: bool) -> str:
    """Ending of models in Stability layout."""
    return ".safetensors" if use_safetensors else ".ckpt"


def due_after_step(config: SavingConfig, step: int) -> bool:
    """Whether update `step` is one to save after."""
    return bool(config.save_every_n_steps) and step % config.save_every_n_steps == 0


def due_after_epoch(config: SavingConfig, epoch: int, epochs: int) -> bool:
    """Whether epoch `epoch` of `epochs` is one to save after; the last gives the final file only."""
    return bool(config.save_every_n_epochs) and epoch % config.save_every_n_epochs == 0 and epoch < epochs


def state_due_at_end(config: SavingConfig) -> bool:
    """Whether the run ends with a state folder."""
    return config.save_state or config.save_state_on_train_end


def with_epoch_ratio(config: SavingConfig, epochs: int) -> SavingConfig:
    """`--save_n_epoch_ratio` as the `save_every_n_epochs` it means in a run of `epochs` epochs."""
    if not config.save_n_epoch_ratio or config.save_n_epoch_ratio < 1:
        return config
    return replace(config, save_every_n_epochs=max(1, epochs // config.save_n_epoch_ratio))


def oldest_epoch_to_go(config: SavingConfig, epoch: int, *, state: bool = False) -> int | None:
    """After epoch `epoch` was saved: files of this epoch and of earlier ones go; None = all stay.

    Raises:
        UserError: `--save_last_n_epochs 0`, which would remove the file just written.
    """
    keep = _window(config, "epochs", state)
    if keep is None or not config.save_every_n_epochs:
        return None
    number = epoch - config.save_every_n_epochs * keep
    return number if number >= 0 else None


def oldest_step_to_go(config: SavingConfig, step: int, *, state: bool = False) -> int | None:
    """The same for update `step`: whatever is more than `--save_last_n_steps` updates old goes.

    Raises:
        UserError: `--save_last_n_steps 0`.
    """
    keep = _window(config, "steps", state)
    if keep is None or not config.save_every_n_steps:
        return None
    number = step - keep - 1
    number -= number % config.save_every_n_steps
    return number if number >= 0 else None


def _window(config: SavingConfig, unit: str, state: bool) -> int | None:
    keep = getattr(config, f"save_last_n_{unit}")
    if keep is not None and keep < 1:
        raise UserError(f"--save_last_n_{unit} {keep} would keep nothing", "give 1 or more, or leave it out")
    return (getattr(config, f"save_last_n_{unit}_state") or keep) if state else keep


def _or_default(name: str | None, default: str) -> str:
    return default if name is None else name


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file or folder that this run wrote.

    Attributes:
        path: where it lies.
        kind: saved after an `epoch` or a `step`.
        number: of that epoch or step.
        state: a state folder.
    """

    path: str
    kind: Kind
    number: int
    state: bool = False


class SavedFiles:
    """The run's own record of what it wrote; only files in it are ever removed."""

    def __init__(self, files: Iterable[SavedFile] = ()) -> None:
        self.files = list(files)

    def add(self, path: str | Path, kind: Kind, number: int, *, state: bool = False) -> None:
        """Note a file or folder that was just written; written again, it counts once."""
        new = SavedFile(str(path), kind, number, state)
        self.files = [file for file in self.files if file.path != new.path]
        self.files.append(new)

    def remove_until(
        self,
        kind: Kind,
        number: int | None,
        *,
        state: bool = False,
        busy: Callable[[str], bool] = lambda path: False,
    ) -> list[str]:
        """Remove everything of one kind up to a number.

        Args:
            number: from `oldest_epoch_to_go` or `oldest_step_to_go`; None removes nothing.
            busy: tells of a path that it is still needed (an upload runs); it goes at the next call.

        Returns:
            The paths that were removed.
        """
        if number is None:
            return []
        old = [f for f in self.files if f.kind == kind and f.state == state and f.number <= number and not busy(f.path)]
        removed = [file for file in old if _remove(Path(file.path))]
        self.files = [file for file in self.files if file not in removed]
        return [file.path for file in removed]

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data for the state folder."""
        return [asdict(file) for file in self.files]

    @classmethod
    def from_data(cls, data: Iterable[dict[str, Any]]) -> SavedFiles:
        """The record of a resumed run."""
        return cls(SavedFile(**entry) for entry in data)


def _remove(path: Path) -> bool:
    """Remove a file or folder; a failure is told and tried again later. One that is gone counts as removed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the old %s cannot be removed (%s)", path, error.strerror or error)
        return False
    log.info("removed the old %s", path)
    return True
