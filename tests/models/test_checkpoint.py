"""Model files: what can be opened, what is refused, and how."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from library.messages import UserError
from library.models.checkpoint import DTYPES, open_checkpoint, read_metadata
from library.models.checkpoint_writer import Pending, save_tensors, write_pickle, write_safetensors


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"{n}.{word}": torch.arange(6).to(dtype) for word, dtype in DTYPES.items() for n in "ba"}
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0), "grün": torch.ones(2, 3).T}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.float().equal(b.float())


def test_our_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    tensors = {k: v.contiguous() for k, v in every_dtype().items()}
    save_tensors(tmp_path / "a.safetensors", every_dtype(), {"key": 'a "text"\n é'})
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, {"key": 'a "text"\n é'})


def test_read_equals_written(tmp_path):
    save_file({k: v.contiguous() for k, v in every_dtype().items()}, tmp_path / "a.safetensors", {"k": "v"})
    opened = open_checkpoint(tmp_path / "a.safetensors")
    assert opened.metadata == {"k": "v"} == read_metadata(tmp_path / "a.safetensors")
    got = opened.read()
    assert got.keys() == every_dtype().keys()
    assert all(same(got[k], v) for k, v in every_dtype().items())
    assert list(opened.read(["scalar", "a.F16"])) == [k for k in opened.tensors if k in ("scalar", "a.F16")]


def test_header_length_that_looks_like_a_pickle(tmp_path):
    path = tmp_path / "a.safetensors"
    for padding in range(300):
        save_file({"w": torch.ones(2)}, path, {"x": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert open_checkpoint(path).read()["w"].tolist() == [1, 1]
    assert read_metadata(path) == {"x": "x" * padding}


def test_cast_leaves_integers(tmp_path):
    save_file(
        {"f": torch.ones(2, dtype=torch.float16), "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.safetensors"
    )
    got = open_checkpoint(tmp_path / "a.safetensors").read(dtype=torch.bfloat16)
    assert (got["f"].dtype, got["i"].dtype) == (torch.bfloat16, torch.int64)


def test_data_hash_in_the_same_pass(tmp_path):
    from library.models.hashes import safetensors_data_hash_of

    tensor = torch.arange(1000.0)
    items = [Pending("a", tensor.dtype, (1000,), lambda: tensor)]
    write_safetensors(tmp_path / "a.safetensors", items, {"x": "y"}, hash_key="h")
    with open(tmp_path / "a.safetensors", "rb") as file:
        assert read_metadata(tmp_path / "a.safetensors") == {"x": "y", "h": "0x" + safetensors_data_hash_of(file)}
    assert load_file(tmp_path / "a.safetensors")["a"].equal(tensor)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    state = {"w": torch.arange(4.0)}
    wrapped = {"state_dict": state, "epoch": 3, "global_step": 70}
    torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(path)
    assert (opened.epoch, opened.global_step, opened.metadata) == (3, 70, {})
    assert opened.read()["w"].equal(state["w"])
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(path)
    assert (opened.epoch, opened.read()["w"].tolist()) == (None, [0, 1, 2, 3])


def test_pickle_tensors_do_not_point_into_the_file(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.zeros(100_000)}, path)
    tensor = open_checkpoint(path).read()["w"]
    write_pickle(path, [Pending("w", torch.float32, (100_000,), lambda: torch.ones(100_000))])
    assert tensor.sum() == 0 and open_checkpoint(path).read()["w"].sum() == 100_000


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused(tmp_path, zipped):
    path = tmp_path / "bad.ckpt"
    torch.save(
        {"state_dict": {"w": torch.zeros(1)}, "x": Malicious(tmp_path / "ran")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match=r"bad\.ckpt wants to run code .*mkdir") as error:
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(error.value)


def test_objects_of_old_trainers_become_inert(tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks")
    ran = []
    callback = type(
        "ModelCheckpoint", (), {"__module__": module.__name__, "__setstate__": lambda s, state: ran.append(1)}
    )
    module.ModelCheckpoint = callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    instance = callback()
    instance.best = 3
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": {callback: {"best": torch.ones(1)}}, "object": instance}
    torch.save(content, tmp_path / "a.ckpt")
    before = set(torch.serialization.get_safe_globals())
    assert open_checkpoint(tmp_path / "a.ckpt").read()["w"].tolist() == [1, 1]
    assert not ran and set(torch.serialization.get_safe_globals()) == before


def damaged(path: Path) -> None:
    """A file of each bad kind, by its name."""
    save_file({"w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    kinds = {
        "empty": b"",
        "short": whole[:5],
        "header": whole[:30],
        "data": whole[:-100],
        "text": b"<!DOCTYPE html> this is no model, it is an error page",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12345",
        "garbled": whole[:8] + b"{" + b"x" * (len(whole) - 9),
        "zip": b"PK\x03\x04" + b"x" * 100,
        "pickle": b"\x80\x02cfoo\nbar\n",
        "list": None,
    }
    if kinds[path.stem] is None:
        torch.save([1, 2, 3], path)
    else:
        path.write_bytes(kinds[path.stem])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty"),
        ("short", "is not a model file"),
        ("header", "is truncated"),
        ("data", "is truncated"),
        ("text", "is not a model file"),
        ("lfs", "Git LFS pointer"),
        ("garbled", "damaged header"),
        ("zip", "cannot be read as a model"),
        ("pickle", "wants to run code"),
        ("list", "holds no model weights"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, kind, words):
    path = tmp_path / f"{kind}.safetensors"
    damaged(path)
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        open_checkpoint(tmp_path)


def test_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.zeros(3)})
    before = path.read_bytes()

    def broken() -> torch.Tensor:
        raise RuntimeError("no tensor")

    with pytest.raises(RuntimeError):
        write_safetensors(path, [Pending("w", torch.float32, (3,), broken)])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000, total=10, used=10))
    with pytest.raises(UserError, match="not enough room"):
        save_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1000)})
    with pytest.raises(UserError, match="not enough room"):
        save_tensors(tmp_path / "a.ckpt", {"w": torch.zeros(1000)})
    assert not list(tmp_path.iterdir())


def test_one_tensor_at_a_time(tmp_path):
    """Reading never holds more than a tensor beside what the caller keeps."""
    side = 500_000
    save_file({f"t{i}": torch.ones(side) for i in range(4)}, tmp_path / "a.safetensors")
    sizes = []
    for _, tensor in open_checkpoint(tmp_path / "a.safetensors").stream(dtype=torch.float16):
        sizes.append(tensor.untyped_storage().nbytes())
    assert sizes == [side * 2] * 4
