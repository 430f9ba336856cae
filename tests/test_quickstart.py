"""The one-command installer, without installing: what it decides, and its words when something is in the way."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, at work in a folder of its own."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "installed.json")
    (tmp_path / ".venv").mkdir()
    return module


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"torch": None, "torch_index_url": None, "reinstall": False, **given})


@pytest.fixture
def pip_calls(quickstart, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> str:
        calls.append(arguments)
        return "pip 24.0 from here"

    monkeypatch.setattr(quickstart, "pip", pip)
    monkeypatch.setattr(quickstart, "installed_torch", lambda: "2.13.0+cpu")
    monkeypatch.setattr(quickstart, "test_requirements", lambda: ["pytest>=8"])
    return calls


def installs(calls: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [call for call in calls if call[0] == "install"]


def test_old_python(quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 7, "final", 0))
    with pytest.raises(quickstart.Stop, match=r"Python 3\.9\.7 is too old"):
        quickstart.check_machine()


def test_the_script_parses_on_old_pythons() -> None:
    import ast

    ast.parse((ROOT / "quickstart.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_disk_without_room(quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=2**30))
    with pytest.raises(quickstart.Stop, match=r"only 1\.0 GiB free"):
        quickstart.check_disk()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("NewConnectionError('...: Failed to establish a new connection')", "check the network"),
        ("ERROR: No matching distribution found for x", "No matching distribution"),
    ],
)
def test_failures_of_pip(quickstart, monkeypatch: pytest.MonkeyPatch, output: str, words: str) -> None:
    result = subprocess.CompletedProcess([], 1, stdout="", stderr=output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    with pytest.raises(quickstart.Stop, match=words):
        quickstart.pip("install", "x")


def test_a_second_run_installs_nothing(quickstart, pip_calls: list) -> None:
    quickstart.install(options(), with_tests=False)
    assert len(installs(pip_calls)) == 1
    pip_calls.clear()
    quickstart.install(options(), with_tests=False)
    assert not pip_calls
    quickstart.install(options(reinstall=True), with_tests=False)
    assert pip_calls


def test_tests_install_the_extra_and_serve_the_demo_too(quickstart, pip_calls: list) -> None:
    quickstart.install(options(), with_tests=True)
    assert "pytest>=8" in installs(pip_calls)[1]
    assert set(json.loads(quickstart.STAMP.read_text())) == {"base", "test"}
    pip_calls.clear()
    quickstart.install(options(), with_tests=False)
    quickstart.install(options(), with_tests=True)
    assert not pip_calls


@pytest.mark.parametrize("file", ["requirements.txt", "constraints.txt"])
def test_changed_requirements_are_installed(quickstart, pip_calls: list, file: str) -> None:
    quickstart.install(options(), with_tests=False)
    pip_calls.clear()
    with (quickstart.ROOT / file).open("a") as stream:
        stream.write("# changed\n")
    quickstart.install(options(), with_tests=False)
    assert pip_calls


def test_everything_is_installed_with_the_torch_that_is_there(quickstart, pip_calls: list, monkeypatch) -> None:
    monkeypatch.setattr(quickstart, "installed_torch", lambda: "2.11.0+cu128")
    quickstart.install(options(), with_tests=True)
    assert not [call for call in installs(pip_calls) if any(a.startswith("torch==") for a in call)]
    assert all("-c" in call for call in installs(pip_calls))
    lines = (quickstart.VENV / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.11.0+cu128"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("torch==2.13.0",)),
        ({"torch": "2.4.1"}, ("torch==2.4.1",)),
        ({"torch_index_url": "https://x/cu128"}, ("torch==2.13.0", "--index-url", "https://x/cu128")),
    ],
)
def test_which_torch(quickstart, pip_calls: list, monkeypatch, given: dict, expected: tuple) -> None:
    versions = iter([None, "2.13.0"])
    monkeypatch.setattr(quickstart, "installed_torch", lambda: next(versions))
    quickstart.install(options(**given), with_tests=False)
    assert installs(pip_calls)[0][2:] == expected


def test_an_old_pip_is_replaced(quickstart, pip_calls: list, monkeypatch) -> None:
    monkeypatch.setattr(quickstart, "pip", lambda *a: pip_calls.append(a) or "pip 21.2.4 from here")
    quickstart.install(options(), with_tests=False)
    assert installs(pip_calls)[0][-1] == "pip"


def test_the_tested_set_is_pinned_and_whole(quickstart) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0].lower().replace("_", "-") for line in pins if line and line[0] != "#"]
    assert len(names) == len(set(names))
    assert quickstart.pinned_torch() == "2.13.0"
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    missing = {w.split(">=")[0].lower() for w in wanted} - set(names) - {"tomli"}
    assert not missing
    assert not [w for w in wanted if w.startswith("torch")]


def test_files_of_the_demo_are_there(quickstart) -> None:
    for name in ("train.toml", "prompts.txt", "compare.py", "pictures"):
        assert (ROOT / quickstart.EXAMPLE / name).exists(), name


def test_failing_command_is_named(quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "venv_python", lambda: Path(sys.executable))
    with pytest.raises(quickstart.Stop, match="drawing failed with exit code 3"):
        quickstart.call("drawing", "-c", "raise SystemExit(3)")
    quickstart.call("drawing", "-c", "pass")
