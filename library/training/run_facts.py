"""What a run's record says of the run itself: options, what is trained, length, device."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from library.data import report as data_report
from library.options.describe import describe
from library.runtime.peaks import peak_flops
from library.runtime.precision import weight_dtype
from library.training.record import Record, record_path
from library.training.report import length, parts
from library.training.run_page import page_path
from library.training.saving import DEFAULT_LAST_OUTPUT_NAME
from library.training.work import WorkCounter

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.runtime.processes import Processes
    from library.training.run import Run

SECRETS = frozenset({"wandb_api_key", "huggingface_token"})


def make_record(options: Resolved, processes: Processes) -> Record | None:
    """The record of a run with these options; None in every process but the first."""
    if not processes.is_main:
        return None
    saving = options.saving
    path = record_path(saving.output_dir, saving.output_name)
    return Record(path, None if options.logging.no_report else page_path(path))


def make_work_counter(options: Resolved, processes: Processes) -> WorkCounter:
    """Counts only where the device's peak is known, because there is nothing to compare with elsewhere."""
    peak = peak_flops(processes.device, weight_dtype(options.precision.mixed_precision))
    return WorkCounter(wanted=peak is not None)


def run_facts(options: Resolved, run: Run) -> dict[str, Any]:
    """The `run` line of the record."""
    device, saving = run.processes.device, options.saving
    return {
        "name": saving.output_name or DEFAULT_LAST_OUTPUT_NAME,
        "script": options.script,
        "from_step": run.position.step,
        "max_steps": run.max_steps,
        "epochs": run.epochs,
        "updates_per_epoch": run.feed.updates_per_epoch,
        "pictures_per_update": run.log.pictures_per_update,
        "processes": run.processes.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(device),
        "peak_flops": peak_flops(device, weight_dtype(options.precision.mixed_precision)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "trained": parts(run),
        "length": length(run),
        "data": data_report.describe(run.feed.group.datasets),
        "settings": describe(options),
        "options": {name: options.value(name) for name in sorted(options.given - SECRETS)},
        "ema": {"decay": run.ema.decay, "start": run.ema.start} if run.ema else None,
    }


def _processor(device: torch.device) -> str:
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
