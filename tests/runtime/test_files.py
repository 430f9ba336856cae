"""Files appear whole or not at all; a full disk is told as a sentence."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.messages import UserError
from library.runtime import files
from library.runtime.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_room,
    format_bytes,
    is_disk_full,
    make_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_old_file_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "model.safetensors"
    with atomic_write(target) as file:
        file.write(b"old")
    with atomic_write(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
        assert all(name.endswith(".safetensors") for name in names(target.parent)), "writers look at the suffix"
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["model.safetensors"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("größe\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n".encode()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(target) as file:
        file.write(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_kill_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = (
        "import os, sys; from library.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n    f.write(b'half'); f.flush(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == 9
    assert target.read_bytes() == b"old"


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / content).write_text(content)
    assert names(target / "unet") == ["two"]
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(target / "unet") == ["two"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: IoError(Os { code: 28, message: No space left on device })"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        OSError("There is not enough space on the disk. (os error 112)"),
    ],
)
def test_full_disk_is_a_sentence(tmp_path: Path, error: Exception) -> None:
    assert is_disk_full(error)
    with pytest.raises(UserError, match=r"disk is full, .*a\.bin") as caught, atomic_write(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise error
    assert caught.value.__cause__ is error
    assert names(tmp_path) == []


def test_other_errors_pass_through() -> None:
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))
    assert not is_disk_full(ValueError("wrong"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' full device")
def test_a_device_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_partial_name", lambda target: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self: None)
    with pytest.raises(UserError, match="disk is full"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x" * 100_000)


def test_room_is_checked_where_the_folder_will_be(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(UserError, match=r"1000000000\.0 GB needed, .* free"):
        check_room(tmp_path / "not" / "there", 10**18)
    assert not (tmp_path / "not").exists()


def test_permission_error_of_the_target_is_explained_others_are_not(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(UserError, match="may not be written"), atomic_path(target):
        raise PermissionError(errno.EACCES, "denied", str(target))
    with pytest.raises(PermissionError), atomic_path(target):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/source.bin")


def test_sizes_in_words() -> None:
    assert [format_bytes(n) for n in (512, 3_200, 45_000_000, 6_940_000_000)] == [
        "512 bytes",
        "3.2 kB",
        "45.0 MB",
        "6.9 GB",
    ]


def test_a_writer_inside_a_writer_names_the_outer_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    with atomic_path(target) as outer, atomic_path(outer) as inner:
        assert inner == outer
        inner.write_bytes(b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.bin", b"new")]
    with pytest.raises(UserError, match=f"disk is full, {re.escape(str(target))} was"), atomic_path(target) as outer:  # noqa: SIM117
        with atomic_path(outer):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.bin", b"new")]


@pytest.mark.parametrize("name", ["taken/x.bin", "x" * 300])
def test_a_name_that_cannot_be_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"), atomic_path(tmp_path / name) as partial:
        partial.write_bytes(b"x")


def test_a_folder_for_results(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(str(tmp_path / "a")) == tmp_path / "a"
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(UserError, match="cannot be made"):
            make_folder(path)
