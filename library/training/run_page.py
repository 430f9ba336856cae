"""The page about a training: what was trained, how its loss went, how fast it was, what it drew.

Made from the run's record alone (`record.py`), so it can be made at any time, also while the run goes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.charts import Series, number
from library.messages import UserError, clock
from library.page import Page
from library.runtime.files import atomic_write, format_bytes
from library.training.micro_losses import band_names
from library.training.record import SUFFIX, read_record
from library.training.run_history import History, smoothed, smoothing_window
from library.training.run_pictures import add_pictures

PAGE_SUFFIX = "-report.html"
# Above this share the loader is what limits the speed.
WAITING_LIMIT = 0.15
SLOW_SHARE = 0.15


def write_page(record: Path, page: Path) -> None:
    """Make the page of a record.

    Raises:
        UserError: the record holds no run.
    """
    with atomic_write(page, "w") as file:
        file.write(make_page(record))


def write_pages(folder: Path, page: Path | None = None) -> list[Path]:
    """Make the pages of all records in a folder, or of one record.

    Args:
        folder: output folder of trainings, or a record.
        page: where the only page goes; beside its record when left out.

    Returns:
        The pages.

    Raises:
        UserError: nothing is recorded there, or there are several records for one page.
    """
    records = [folder] if folder.is_file() else sorted(folder.glob(f"*{SUFFIX}"))
    if not records:
        raise UserError(f"{folder} holds no record of a training", f"give a folder with files that end in {SUFFIX}")
    if page is not None and len(records) > 1:
        names = ", ".join(record.name for record in records)
        raise UserError(f"--page names one file, but {folder} has several records ({names})", "name one of them")
    pages = [page or page_path(record) for record in records]
    for record, path in zip(records, pages, strict=True):
        write_page(record, path)
    return pages


def page_path(record: Path) -> Path:
    """Where the page of a record lies: beside it."""
    return record.with_name(record.name.removesuffix(SUFFIX).removesuffix(".jsonl") + PAGE_SUFFIX)


def make_page(record: Path) -> str:
    """The page as text.

    Raises:
        UserError: the record holds no run.
    """
    history = History(read_record(record))
    if not history.runs:
        raise UserError(f"{record} holds no training", "give a file that ends in -metrics.jsonl")
    page = Page(f"Training of {history.run['name']}", _lead(history))
    _add_outcome(page, history)
    if history.steps:
        _add_loss(page, history)
        _add_rates(page, history)
        _add_speed(page, history)
    add_pictures(page, history, record.parent)
    _add_facts(page, history)
    return page.html()


def _lead(history: History) -> str:
    run = history.run
    done = history.steps[-1]["step"] if history.steps else run["from_step"]
    return f"{done:,} of {run['max_steps']:,} steps, {run['script']}, on {run['device']}"


def _add_outcome(page: Page, history: History) -> None:
    page.section("Outcome")
    if history.end is None:
        page.notice("the run is still going, or it was killed", "warning")
    elif history.end["problem"]:
        page.notice(history.end["problem"], "warning" if history.end.get("asked") else "error")
    else:
        page.notice("the run finished", "good")
    for notice in history.notices:
        page.notice(notice["text"], "warning")
    page.facts(_key_facts(history))
    if history.saves:
        with page.details(f"{len(history.saves)} files written"):
            page.table(["step", "file"], [(line["step"], line["path"]) for line in history.saves])


def _key_facts(history: History) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [("training time", clock(history.seconds))] if history.steps else []
    if history.steps:
        facts += [
            ("loss at the end, smoothed", smoothed(history.points("loss"))[-1][1]),
            ("pictures a second", history.pictures_per_second),
        ]
        if history.peak_share is not None:
            facts.append(("share of the device's peak", f"{history.peak_share:.1%}"))
        if history.memory is not None:
            facts.append(("peak memory", format_bytes(history.memory)))
        facts.append(("time spent waiting for data", f"{history.waiting_share:.1%}"))
    if history.validations:
        best = min(history.validations, key=lambda line: line["loss"])
        facts.append(("best validation loss", f"{number(best['loss'])} at step {best['step']:,}"))
        if history.saves:
            nearest = min(history.saves, key=lambda line: abs(line["step"] - best["step"]))
            facts.append(("file saved nearest to it", f"{nearest['path']} (step {nearest['step']:,})"))
        facts.append(("last validation loss", history.validations[-1]["loss"]))
        if history.validations[-1].get("ema") is not None:
            facts.append(("last validation loss of the average", history.validations[-1]["ema"]))
    return facts


def _add_loss(page: Page, history: History) -> None:
    page.section("Loss")
    raw = history.points("loss")
    window = smoothing_window(len(raw))
    page.line_chart(
        [Series("each step", raw, faint=True, colour=0), Series(f"mean of {window} steps", smoothed(raw), colour=0)],
        title="Training loss",
        x_label="step",
        y_label="loss",
        marks=history.epoch_marks(),
    )
    page.text(
        "The loss of a single step says mostly which timesteps it drew. Compare within a band of timesteps, "
        "or look at the validation loss, which uses the same noise every time."
    )
    bands = [
        Series(f"timesteps {name}", points)
        for name, points in zip(band_names(), history.bands(), strict=True)
        if points
    ]
    if bands:
        page.line_chart(bands, title="Training loss by timestep", x_label="step", y_label="loss, smoothed")
    _add_validation(page, history)


def _add_validation(page: Page, history: History) -> None:
    passes = history.validations
    if not passes:
        page.text("No validation loss: `--validation_split 0.1` would hold out a tenth of the pictures and measure it.")
        return
    lines = [Series("validation", [(line["step"], line["loss"]) for line in passes], colour=1)]
    averaged = [(line["step"], line["ema"]) for line in passes if line.get("ema") is not None]
    if averaged:
        lines.append(Series("validation of the moving average", averaged, colour=2))
    best = min(passes, key=lambda line: line["loss"])
    page.line_chart(lines, title="Validation loss", x_label="step", y_label="loss", marks=[(best["step"], "best")])
    by_timestep = [
        Series(
            f"timestep {name}",
            [(line["step"], line["timesteps"][name]) for line in passes if name in line["timesteps"]],
        )
        for name in passes[-1]["timesteps"]
    ]
    page.line_chart(by_timestep, title="Validation loss by timestep", x_label="step", y_label="loss")


def _add_rates(page: Page, history: History) -> None:
    page.section("Learning rates and gradients")
    names = list(history.steps[-1]["rates"])
    rates = {name: [(line["step"], line["rates"].get(name, float("nan"))) for line in history.steps] for name in names}
    page.line_chart(rates, title="Learning rates", x_label="step", y_label="rate")
    norms = [(step, value) for step, value in history.points("norm")]
    if norms:
        page.line_chart(
            [Series("each step", norms, faint=True, colour=0), Series("smoothed", smoothed(norms), colour=0)],
            title="Norm of the gradients before clipping",
            x_label="step",
            y_label="norm",
            log_y=True,
        )
    else:
        page.text("The norm of the gradients was not measured: `--max_grad_norm 0` switches it off.")


def _add_speed(page: Page, history: History) -> None:
    page.section("Speed and memory")
    pictures = history.run["pictures_per_update"]
    speed = [(line["step"], pictures / line["seconds"]) for line in history.steps if line["seconds"]]
    page.line_chart({"": speed}, title="Pictures a second", x_label="step", y_label="pictures/s")
    page.bullets(speed_hints(history))


def speed_hints(history: History) -> list[str]:
    """What limits the speed, with the option to turn."""
    hints = []
    options = history.run["options"]
    if history.waiting_share > WAITING_LIMIT:
        hints.append(f"{history.waiting_share:.0%} of the time the loop waited for pictures: {_data_remedy(options)}")
    if history.peak_share is not None and history.peak_share < SLOW_SHARE:
        hints.append(
            f"the device did {history.peak_share:.1%} of what it can: a larger `--train_batch_size`, "
            "or `--torch_compile`, lets it do more"
        )
    if options.get("gradient_checkpointing"):
        hints.append(
            "`--gradient_checkpointing` spends about a third more time to save memory; "
            "leave it out, or raise `--gradient_checkpointing_interval`, where memory is left"
        )
    return hints


def _data_remedy(options: dict[str, Any]) -> str:
    if options.get("max_data_loader_n_workers") == 0:
        return "raise `--max_data_loader_n_workers`, which is 0"
    if not options.get("cache_latents"):
        return "`--cache_latents` encodes every picture once instead of in every epoch"
    if not options.get("persistent_data_loader_workers"):
        return "`--persistent_data_loader_workers` keeps the reading processes between epochs"
    return "raise `--max_data_loader_n_workers`, or put the pictures on a faster disk"


def _add_facts(page: Page, history: History) -> None:
    run = history.run
    page.section("What was trained")
    page.bullets(run["trained"])
    page.bullets(run["length"])
    if run["ema"]:
        page.text(
            f"Moving average of the weights: decay {number(run['ema']['decay'])}, from step {run['ema']['start']}."
        )
    if len(history.runs) > 1:
        page.text("Resumed at steps " + ", ".join(f"{line['from_step']:,}" for line in history.runs[1:]) + ".")
    page.section("Pictures and captions")
    page.code("\n".join(run["data"]))
    page.section("Settings")
    page.code("\n".join(run["settings"]))
    with page.details("options that were given"):
        page.table(["option", "value"], [(f"--{name}", _shown(value)) for name, value in run["options"].items()])
    page.facts([(name, version) for name, version in run["versions"].items()])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
