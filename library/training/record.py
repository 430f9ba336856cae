"""A run's own record, `<output_name>-metrics.jsonl` beside its results: one JSON object a line.

    run         at every start: options, what is trained, device, length
    step        one update: loss, rates, gradient norm, losses by timestep band, time, memory
    validation  one pass
    sample      one sample picture
    save        one written file
    end         how the run ended

Lines are appended whole. A state folder says how long the record was when it was saved; a resumed run goes on from
there, so no step stands in it twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from library.messages import Interrupted, log
from library.runtime.files import atomic_path

FORMAT = 1
SUFFIX = "-metrics.jsonl"


class Record:
    """The record of one run, written by the main process.

    Args:
        path: of the file.
        page: where the report is written when the run ends, None for none.
    """

    def __init__(self, path: Path, page: Path | None = None) -> None:
        self.path = path
        self.page = page
        self._kept: bytes | None = None
        self._file: Any = None

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Keep what the resumed run had recorded when its state was saved (`state()`); before `start`."""
        self._kept = b""
        if state is None:
            return
        own = self.path if self.path.exists() else Path(state["path"])
        try:
            with open(own, "rb") as file:
                self._kept = file.read(state["size"])
        except OSError:
            log.info("the record of the earlier steps, %s, is gone; it begins anew", own)

    def start(self, facts: dict[str, Any]) -> None:
        """Open the file: anew, or with what `go_on` kept."""
        with atomic_path(self.path) as partial:
            partial.write_bytes(self._kept or b"")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, it is open as long as the run
        self.add({"kind": "run", "format": FORMAT, "resumed": self._kept is not None, **facts})

    def add(self, *lines: dict[str, Any]) -> None:
        """Append lines with one write."""
        if self._file is None:
            return
        now = round(time.time(), 3)
        text = "".join(json.dumps({**plain(line), "time": now}) + "\n" for line in lines)
        try:
            self._file.write(text.encode())
        except OSError as error:
            log.warning("%s cannot be written any more (%s); training goes on without it", self.path, error.strerror)
            self.close()

    @contextlib.contextmanager
    def open_until_the_end(self) -> Iterator[None]:
        """Note how the block ended, and write the report."""
        try:
            yield
        except BaseException as error:
            self._finish(str(error).split("\n")[0] or type(error).__name__, asked=isinstance(error, Interrupted))
            raise
        self._finish(None)

    def _finish(self, problem: str | None, asked: bool = False) -> None:
        self.add({"kind": "end", "problem": problem, "asked": asked})
        self.close()
        if self.page is None:
            return
        from library.training.run_page import write_page

        try:
            write_page(self.path, self.page)
            log.info("report: %s", self.page)
        except Exception as error:  # a report must not turn a finished training into a failed one
            log.warning("the report %s was not written (%s: %s)", self.page, type(error).__name__, error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """Where the record is and how long it is now."""
        size = os.path.getsize(self.path) if self.path.exists() else 0
        return {"path": str(self.path.absolute()), "size": size}


def record_path(output_dir: str | None, output_name: str | None) -> Path:
    """Where the record of a run with these options lies."""
    return Path(output_dir or ".") / f"{output_name or 'last'}{SUFFIX}"


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was cut off by a kill is left out."""
    return list(_parsed(path.read_text(encoding="utf-8").splitlines()))


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def plain(value: Any) -> Any:
    """A value as strict JSON has it: numbers with the digits of float32, null where not finite; paths as texts."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
