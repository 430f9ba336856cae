"""What is said, where, and how it ends."""

from __future__ import annotations

import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from library import messages
from library.messages import Interrupted, Progress, UserError, clock, log, progress, run, set_up, warn_once

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def restore() -> None:
    yield
    set_up()
    for handler in log.handlers[:]:
        log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


SEVERAL = "error: a.toml has 2 problems\n  line 3: x y\n  line 4: z"


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UserError("model.ckpt is truncated", "download it again"),
            1,
            "error: model.ckpt is truncated: download it again",
        ),
        (UserError("two\nlines"), 1, "error: two lines"),
        (UserError("a.toml has 2 problems", details=["line 3: x\ny", "line 4: z"]), 1, SEVERAL),
        (Interrupted("stopped, go on with --resume x"), 130, "stopped, go on with --resume x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_ends_of_a_script(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run(failing(error))
    assert end.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_several_things_survives_a_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("bad", "mend", ["a", "b"])))
    assert (error.problem, error.remedy, error.details) == ("bad", "mend", ("a", "b"))
    assert str(error) == "bad: mend\n  a\n  b"


def test_warnings_are_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_said", set())
    for _ in range(3):
        warn_once("mind the gap")
    assert [r.getMessage() for r in caplog.records] == ["mind the gap"]


def test_level_file_and_stream(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "log.txt"
    set_up("WARNING", str(file))
    log.info("quiet")
    log.warning("ö loud")
    captured = capsys.readouterr()
    assert captured.err == "ö loud\n"
    assert captured.out == ""
    assert file.read_text(encoding="utf-8") == "ö loud\n"


def test_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--console_log_file"):
        set_up(file=str(tmp_path / "none" / "log.txt"))


def test_a_console_that_cannot_show_a_character() -> None:
    code = "from library.messages import *; set_up(); log.info('日本'); write('日本'); raise_it = UserError('日')"
    code += "\ndef main(): raise raise_it\nrun(main)"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [rb"\u65e5\u672c", rb"error: \u65e5"]
    assert result.stdout.splitlines() == [rb"\u65e5\u672c"]


def test_a_reader_that_has_gone() -> None:
    code = "from library.messages import write\nfor _ in range(9999): write('x' * 100)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
    process.stderr.close()


def test_plain_progress(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with Progress(10, "steps", initial=2) as bar:
        for _ in range(4):
            now[0] += 10
            bar.update(loss=0.12345)
        assert bar.rate == pytest.approx(0.1)
        assert bar.seconds_left == pytest.approx(40)
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [
        "steps 4/10, 0.1/s, 1:00 left, loss 0.1235",
        "steps 6/10, 0.1/s, 0:40 left, loss 0.1235",
        "steps 6/10, 0.1/s, 0:40 left, loss 0.1235",
    ]


def test_progress_of_items(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress(range(3), "files")) == [0, 1, 2]
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["files 3/3"]
    assert list(progress(iter("ab"), "files")) == ["a", "b"]


def test_other_processes_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    messages.set_quiet(True)
    try:
        list(progress(range(3), "files"))
    finally:
        messages.set_quiet(False)
    assert not caplog.records


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    set_up()
    with Progress(3, "steps") as bar:
        bar.update(3, loss=0.5)
        log.info("[saved] to a [red]folder[/red]")
    text = terminal.getvalue()
    assert "[saved] to a [red]folder[/red]" in text
    assert "3/3" in text
    assert "loss 0.5" in text
    assert messages._Console.live is None


def test_simple_console_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    set_up(simple=True)
    assert not messages.has_terminal()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
