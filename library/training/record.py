"""A run's own record, `<output_name>-metrics.jsonl` beside its results: one JSON object a line.

    run         at every start: options, what is trained, device, length
    step        one update: loss, rates, gradient norm, losses by timestep band, time, memory
    validation  one pass
    sample      one sample picture
    save        one written file
    end         how the run ended

The file is made with the first step, so a run that fails before leaves an earlier one as it was. Lines are appended
whole. A state folder says how long the record was when it was saved; a resumed run goes on from
there, so no step stands in it twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from library.messages import Interrupted, UserError, log
from library.runtime.files import atomic_path
from library.training.saving import DEFAULT_LAST_OUTPUT_NAME

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
        self._early = b""
        self._file: Any = None
        self._size = self._checksum = 0

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Keep what the resumed run had recorded when its state was saved (`state()`); before `start`."""
        self._kept = b""
        if state is None:
            return
        own = self.path if self.path.exists() else Path(state["path"])
        try:
            with open(own, "rb") as file:
                kept = file.read(state["size"])
        except OSError:
            kept = b""
        if zlib.crc32(kept) == state.get("checksum"):
            self._kept = kept
        else:
            log.info("%s is not the record of the earlier steps any more; it begins anew", own)

    def start(self, facts: dict[str, Any]) -> None:
        """The first line: of a new record, or after what `go_on` kept."""
        self.add({"kind": "run", "format": FORMAT, "resumed": self._kept is not None, **facts})

    def add(self, *lines: dict[str, Any]) -> None:
        """Append lines with one write."""
        now = round(time.time(), 3)
        text = "".join(json.dumps({**plain(line), "time": now}) + "\n" for line in lines).encode()
        try:
            if self._file is None and not self._size:
                self._early += text
                if any(line["kind"] == "step" for line in lines):
                    self._begin()
            elif self._file is not None:
                self._file.write(text)
                self._count(text)
        except (OSError, UserError) as error:
            log.warning("%s cannot be written any more (%s); training goes on without it", self.path, error)
            self.close()

    def _begin(self) -> None:
        """Make the file, with what there is so far."""
        text, self._early = (self._kept or b"") + self._early, b""
        self._count(text)
        with atomic_path(self.path) as partial:
            partial.write_bytes(text)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, it is open as long as the run

    def _count(self, text: bytes) -> None:
        self._size += len(text)
        self._checksum = zlib.crc32(text, self._checksum)

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
        if self.page is None or not self._size:
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
        kept = self._kept or b""
        size, checksum = (self._size, self._checksum) if self._size else (len(kept), zlib.crc32(kept))
        return {"path": str(self.path.absolute()), "size": size, "checksum": checksum}


def record_path(output_dir: str | None, output_name: str | None) -> Path:
    """Where the record of a run with these options lies."""
    return Path(output_dir or ".") / f"{output_name or DEFAULT_LAST_OUTPUT_NAME}{SUFFIX}"


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
