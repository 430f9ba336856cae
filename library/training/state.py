"""State folders: everything that a run needs to go on exactly where it stopped.

    weights.safetensors   what is trained (for a network: the network alone, no base model)
    optimizer.pt          optimizer and schedule state, gradient scaler
    average.safetensors   the moving average of the weights, with --ema_decay
    run.json              position, seed, shape of the run, recorded losses, files written

Random numbers need no state: every draw is a function of seed and position (`draws.py`). A folder is written
beside its final name and renamed, so a kill leaves the old folder or the new one. Folders of sd-scripts
(written by accelerate, without a position) are read too.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from library.messages import UserError, log
from library.runtime.files import atomic_folder, check_room
from library.training.optimizers import load_optimizer_state
from library.training.run import Position

if TYPE_CHECKING:
    from library.training.run import Run

FORMAT = 1
RUN_FILE = "run.json"
AVERAGE_FILE = "average.safetensors"


def save_state(run: Run, folder: Path) -> None:
    """Write a state folder; the main process does, and where weights are spread all take part."""
    optimizer = run.parallel.optimizer_state(run.optimizer)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in run.target.state_dict().items()}
    if not run.processes.is_main:
        return
    size = sum(t.numel() * t.element_size() for t in weights.values())
    check_room(folder.parent, (5 if run.ema else 4) * size)
    facts = {
        "format": FORMAT,
        "position": asdict(run.position),
        "seed": run.seed,
        "accumulation": run.accumulation,
        "processes": run.processes.count,
        "batches_per_epoch": run.feed.batches_per_epoch,
        "losses": run.log.state(),
        "files": run.saver.files_written(),
        "validation": run.validation.state(),
        "record": run.log.record.state() if run.log.record else None,
    }
    if run.ema:
        facts["ema_updates"], averages = run.ema.state()
    parts = {
        "optimizer": optimizer,
        "schedule": plain_schedule_state(run.lr_schedule),
        "scaler": run.scaler.state_dict() if run.scaler else None,
    }
    with atomic_folder(folder) as partial:
        save_file(weights, partial / "weights.safetensors")
        if run.ema:
            save_file(averages, partial / AVERAGE_FILE)
        torch.save(parts, partial / "optimizer.pt")
        (partial / RUN_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def plain_schedule_state(schedule: Any) -> dict[str, Any]:
    """A schedule's state without functions, which cannot be stored."""
    return {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas" and not callable(v)}


def require_state_folder(folder: Path) -> None:
    """Refuse a `--resume` that is not there.

    Raises:
        UserError: it is not.
    """
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder", "give the path of a ...-state folder")


def load_state(run: Run, folder: Path) -> None:
    """Restore a run from a state folder: weights, optimizer, schedule, scaler, position.

    Raises:
        UserError: not a state folder, or of a run that this one cannot continue.
    """
    require_state_folder(folder)
    if not (folder / RUN_FILE).exists():
        load_accelerate_state(run, folder)
        return
    facts, weights, stored = read_parts(folder)
    check_same_run(run, facts, folder)
    load_weights(run, weights, folder)
    load_optimizer(run, stored["optimizer"], folder)
    load_schedule(run, stored["schedule"])
    if run.scaler and stored["scaler"]:
        run.scaler.load_state_dict(stored["scaler"])
    run.position = Position(**facts["position"])
    run.log.load_state(facts["losses"])
    run.saver.adopt_files(facts["files"])
    run.validation.load_state(facts.get("validation"))
    load_average(run, folder, facts.get("ema_updates", 0))
    if run.log.record is not None:
        run.log.record.go_on(facts.get("record"))
    log.info("resumed from %s: epoch %d, step %d", folder, run.position.epoch, run.position.step)


def read_parts(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """(facts, weights, optimizer and schedule) of a state folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds for a cut file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {folder} is damaged ({reason})", "copy it again, or resume another state") from error
    return facts, weights, stored


def check_same_run(run: Run, facts: dict[str, Any], folder: Path) -> None:
    """Refuse a state whose position would mean something else in this run."""
    now = {
        "seed": run.seed,
        "accumulation": run.accumulation,
        "processes": run.processes.count,
        "batches_per_epoch": run.feed.batches_per_epoch,
    }
    names = {
        "seed": "--seed",
        "accumulation": "--gradient_accumulation_steps",
        "processes": "the number of processes",
        "batches_per_epoch": "the data set (batches per epoch)",
    }
    differing = [f"{names[key]} is {now[key]}, was {facts[key]}" for key in now if now[key] != facts[key]]
    if differing and facts["position"]["micro"]:
        raise UserError(
            f"--resume {folder} stands in the middle of an epoch of another run ({'; '.join(differing)})",
            "use the same settings, or resume from a state saved at the end of an epoch",
        )
    for line in differing:
        log.warning("resuming with a difference: %s", line)


def _read_model(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def load_weights(run: Run, weights: Any, folder: Path) -> None:
    """Into the target: its own state, or a list of states as sd-scripts' folders hold them."""
    try:
        if isinstance(weights, list):
            run.target.load_prepared(weights)
        else:
            run.target.load_state_dict(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--resume {folder} holds other weights than this run trains ({reason})",
            "use the options that say what is trained (for a network: module, dim, args) that the state was made with",
        ) from error


def load_average(run: Run, folder: Path, updates: int) -> None:
    """The moving average of the weights; from a state without one it begins with the weights as they are now."""
    path = folder / AVERAGE_FILE
    if not run.ema:
        if path.exists():
            log.warning("%s holds a moving average of the weights; without --ema_decay it ends here", folder)
        return
    if path.exists():
        run.ema.load_state(updates, load_file(path))
        return
    log.warning("%s holds no moving average of the weights: it begins now", folder)
    run.ema.restart()


def load_optimizer(run: Run, state: dict[str, Any], folder: Path) -> None:
    try:
        run.parallel.load_optimizer(run.optimizer, state, load_optimizer_state)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--resume {folder} was made with another optimizer or other parameter groups",
            "use the same --optimizer_type and learning-rate options",
        ) from error


def load_schedule(run: Run, state: dict[str, Any]) -> None:
    own = run.lr_schedule.state_dict()
    run.lr_schedule.load_state_dict({**own, **state})


def load_accelerate_state(run: Run, folder: Path) -> None:
    """Restore a state folder written by accelerate: its models in order; the schedule tells the step."""
    models = sorted(folder.glob("pytorch_model*.bin"), key=_model_number) or sorted(
        folder.glob("model*.safetensors"), key=_model_number
    )
    if not models or not (folder / "optimizer.bin").exists():
        raise UserError(f"--resume {folder} is not a state folder", f"it has neither {RUN_FILE} nor optimizer.bin")
    load_weights(run, [_read_model(path) for path in models], folder)
    optimizer_state = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    load_optimizer(run, run.target.prepared_optimizer_state(optimizer_state), folder)
    schedule_file = folder / "scheduler.bin"
    steps = 0
    if schedule_file.exists():
        schedule = torch.load(schedule_file, map_location="cpu", weights_only=True)
        steps = int(schedule.get("last_epoch", 0)) // run.processes.count
        load_schedule(run, {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": schedule.get("_last_lr", [])})
    per_epoch = run.feed.updates_per_epoch
    run.position = Position(epoch=steps // per_epoch + 1, micro=0, step=steps)
    log.warning(
        "%s was written by sd-scripts and holds no position: going on at step %d, at the start of epoch %d",
        folder,
        steps,
        run.position.epoch,
    )


def _model_number(path: Path) -> int:
    digits = "".join(c for c in path.stem if c.isdigit())
    return int(digits) if digits else 0
