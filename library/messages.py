"""What the program says: one logger, progress, errors that a user can act on, warnings said once. No torch here.

Messages go to standard error, what a user asked for (`write`) to standard output. Only the first process speaks;
`set_quiet(True)` silences the others (called by `library.runtime.processes`).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

log = logging.getLogger("toolkit")
_said: set[str] = set()

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
# Seconds between two lines of progress where there is no terminal.
PLAIN_INTERVAL = 15.0

ItemT = TypeVar("ItemT")


class UserError(Exception):
    """Bad input: printed as one line that names the thing and the remedy, exit code 1, no traceback.

    Attributes:
        problem, remedy: the line's parts.
        details: where several things are wrong, each of them; printed below, a line each.
    """

    def __init__(self, problem: str, remedy: str = "", details: Sequence[str] = ()) -> None:
        self.problem = problem
        self.remedy = remedy
        self.details = tuple(details)
        super().__init__("\n  ".join([f"{problem}: {remedy}" if remedy else problem, *self.details]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.remedy, self.details)


class Interrupted(Exception):
    """The user stopped the run (Ctrl-C, SIGTERM); work was saved, the message says how to go on."""


class _Console:
    """Where messages go, and the progress display that is drawn there now, if any."""

    simple = False
    live: Any = None


class _LineHandler(logging.StreamHandler):
    """Plain lines on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if _Console.live is not None:
            _Console.live.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream = sys.stderr
            super().emit(record)


def set_up(level: str = "INFO", file: str | None = None, simple: bool = False) -> None:
    """Send messages to standard error and, when given, to a file.

    Args:
        level: least important messages that are shown.
        simple: plain lines instead of progress bars, also on a terminal.
    """
    _Console.simple = simple
    for stream in (sys.stdout, sys.stderr):
        # a console that cannot show a character shows its code; it never stops the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handlers: list[logging.Handler] = [_LineHandler(sys.stderr)]
    if file:
        try:
            handlers.append(logging.FileHandler(file, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}", "give another --console_log_file") from None
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(level)


def set_up_from(namespace: Any) -> None:
    """`set_up` from the console options of a script's namespace."""
    set_up(
        getattr(namespace, "console_log_level", None) or "INFO",
        getattr(namespace, "console_log_file", None),
        bool(getattr(namespace, "console_log_simple", False)),
    )


def set_quiet(quiet: bool) -> None:
    """Silence this process (every process but the first)."""
    log.disabled = quiet


def warn_once(text: str) -> None:
    """Say a warning the first time it comes up, not again."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def write(text: str) -> None:
    """Put what the user asked for on standard output, whole even when the reader has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # the reader closed the pipe; without this Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_terminal() -> bool:
    """True where a progress bar can be drawn."""
    return not _Console.simple and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Progress of a known number of units: a bar on a terminal, a line now and then elsewhere.

    Use as a context manager; `update` after each unit.

    Args:
        total: units in all, or None where that is not known.
        description: what is going on, e.g. `steps`.
        initial: units done before (a resumed run).
    """

    def __init__(self, total: int | None, description: str, *, initial: int = 0) -> None:
        self.total = total
        self.description = description
        self.done = initial
        self._initial = initial
        self._started = time.monotonic()
        self._last_line = self._started
        self._shown: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if not log.disabled and has_terminal() and _Console.live is None:
            self._bar = _rich_bar()
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, shown="")
            self._bar.start()
            _Console.live = self._bar
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            _Console.live = None
            self._bar = None
        elif self.done > self._initial and error[0] is None:
            log.info(self.line())

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._initial) / max(time.monotonic() - self._started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left, None before the first unit or without a total."""
        if self.total is None or self.done <= self._initial:
            return None
        return max(0, self.total - self.done) / self.rate

    def update(self, count: int = 1, **shown: Any) -> None:
        """Count units as done, and show values beside the bar (`update(loss=0.12)`); shown values stay."""
        self.done += count
        self._shown.update(shown)
        if self._bar is not None:
            shown = ", ".join([self._speed(), self._values()] if self._shown else [self._speed()])
            self._bar.update(self._task, completed=self.done, shown=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            log.info(self.line())

    def line(self) -> str:
        """The state in one line of text."""
        amount = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        left = self.seconds_left
        parts = [f"{self.description} {amount}", self._speed()]
        if left:
            parts.append(f"{clock(left)} left")
        values = self._values()
        return ", ".join([*parts, values] if values else parts)

    def _speed(self) -> str:
        return f"{self.rate:,.0f}/s" if self.rate >= 100 else f"{self.rate:.3g}/s"

    def _values(self) -> str:
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._shown.items())


def progress(items: Iterable[ItemT], description: str, total: int | None = None) -> Iterator[ItemT]:
    """Go through items and show how far it is; `total` where the items have no length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(total, description) as bar:
        for item in items:
            yield item
            bar.update()


def clock(seconds: float) -> str:
    """Seconds as `M:SS` or `H:MM:SS`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rich_bar() -> Any:
    # rich costs 0.1 s to import, so only where a bar is drawn
    from rich import console as rich_console
    from rich import progress as rich_progress

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[shown]}"),
        console=rich_console.Console(stderr=True),
        refresh_per_second=4,
    )


def run(main: Callable[[], None]) -> None:
    """Run a script's main function with the exit codes and error lines of this house."""
    try:
        main()
    except UserError as error:
        head = f"{error.problem}: {error.remedy}" if error.remedy else error.problem
        _fail(f"error: {head}", EXIT_ERROR, error.details)
    except Interrupted as stop:
        _fail(str(stop), EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)


def _fail(text: str, code: int, details: Sequence[str] = ()) -> None:
    if _Console.live is not None:
        _Console.live.stop()
        _Console.live = None
    for part in (text, *(f"  {detail}" for detail in details)):
        line = " ".join(part.split("\n")).encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        print(line.decode(sys.stderr.encoding or "utf-8"), file=sys.stderr)
    sys.exit(code)
