"""The bucket tool against the original's runs with a stand-in VAE.

Its faults, where the new rules hold: pictures smaller than the steps and unreadable ones ended the run, a missing
metadata file was no error, folders below collided without full paths, nothing was written when a run was stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import prepare_buckets_latents
from library.messages import UserError
from library.options.bucket_tool import with_mask_values
from library.options.parser import parse
from library.training import bucket_tool
from tests.conftest import GOLDEN, load_json
from tests.data.test_cache import gradient
from tests.tools.test_caching_tools import Stub

CASES = load_json(GOLDEN / "tools_prepare_buckets.json")["cases"]
# Stopped with an error there, or should have -> what the message names.
REFUSED = {
    "metadata file missing": "metadata file in.json does not exist",
    "bad resolution": "--max_resolution 128 is no WIDTH,HEIGHT",
    "recursive without full path: stems collide": "--recursive without --full_path",
}
# Ended with an exception there and works here -> what the plain case of the same pictures gives.
WORKS = {
    "many sizes, no upscale": None,
    "corrupt image is left out, data loader": "corrupt image is left out",
}


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in is asked; a picture whose mean is not finite stops it."""
    asked = []
    monkeypatch.setattr(bucket_tool, "load_vae", lambda source: Stub(asked))
    return asked


def lay_out(case):
    Path("d").mkdir()
    for name, size in case["files"].items():
        path = Path("d") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in case["bad_files"]:
            path.write_bytes(b"no picture")
            continue
        gradient(path, size)
        if name in case["modes"]:
            Image.open(path).convert(case["modes"][name]).save(path)
    if case["in_json"] is not None:
        Path("in.json").write_text(json.dumps(case["in_json"]))


def start(argv):
    prepare_buckets_latents.main(parse(prepare_buckets_latents.SCRIPT, with_mask_values(argv)))


def same_arrays(path, told, tolerance):
    with np.load(path) as file:
        assert set(file.files) - {"cache_key"} == set(told), path
        for name, facts in told.items():
            array = file[name]
            assert [list(array.shape), str(array.dtype)] == [facts["shape"], facts["dtype"]], (path, name)
            if "values" in facts:
                np.testing.assert_allclose(array, facts["values"], atol=max(tolerance, 1e-6))  # six digits
                continue
            corners = array[:, [0, 0, -1, -1], [0, -1, 0, -1]].ravel()
            assert array.mean() == pytest.approx(facts["mean"], abs=tolerance), (path, name)
            assert corners.tolist() == pytest.approx(facts["corners"], abs=tolerance), (path, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_recorded_runs(case, calls, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    lay_out(case)
    if case["case"] in REFUSED:
        with pytest.raises(UserError, match=REFUSED[case["case"]]):
            start(case["argv"])
        assert not calls and not Path("out.json").exists()
        return
    start(case["argv"])
    if case["case"] in WORKS and WORKS[case["case"]] is None:
        check_pictures_too_small(case, caplog)
        return
    if case["case"] in WORKS:
        case = next(c for c in CASES if c["case"] == WORKS[case["case"]])
    tolerance = 1e-2 if case["vae_dtype"] != "torch.float32" else 1e-5
    assert json.loads(Path("out.json").read_text()) == case["out_json"]
    made = {path.relative_to("d").as_posix(): path for path in Path("d").rglob("*.npz")}
    assert set(made) == set(case["npz"])
    for name, told in case["npz"].items():
        same_arrays(made[name], told, tolerance)
    assert {dtype for _, dtype in calls} <= {case["vae_dtype"]}
    pictures = case["second_run"]["first_run_vae_calls"] if case["second_run"] else case["vae_calls"]
    assert Counter(shape for shape, _ in calls) == Counter(map(tuple, pictures))
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("bucket ")] == case["bucket_lines"]
    (error,) = case["mean_ar_error"]
    said = float(next(line for line in lines if line.startswith("mean ar error")).split(": ")[1])
    assert said == pytest.approx(0 if np.isnan(error) else error, rel=1e-9)
    if case["second_run"]:
        calls.clear()
        start(case["argv"])
        assert Counter(shape for shape, _ in calls) == Counter(map(tuple, case["vae_calls"]))
        assert json.loads(Path("out.json").read_text()) == case["out_json"]


def check_pictures_too_small(case, caplog):
    """One picture is smaller than the steps and may not be enlarged: it alone is left out."""
    assert "left out, smaller than bucket_reso_steps 64: d/11.png (77x33), d/14.png (16x16)" in caplog.text
    written = json.loads(Path("out.json").read_text())
    sized = {key for key, entry in written.items() if "train_resolution" in entry}
    assert sized == {Path(name).stem for name in case["files"]} - {"11", "14"}
    for name, told in case["npz"].items():
        same_arrays(Path("d") / name, told, 1e-5)


def test_exceptions_are_recorded_cases():
    names = {case["case"] for case in CASES}
    assert names >= {*REFUSED, *WORKS} and len(CASES) == 25


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Four pictures in `d`, and an empty metadata file."""
    monkeypatch.chdir(tmp_path)
    case = next(case for case in CASES if case["case"] == "skip existing, second run encodes nothing")
    lay_out({**case, "in_json": {}})
    return [*case["argv"]]


def test_truncated_pictures_are_skipped(pictures, calls, caplog):
    data = Path("d/02.png").read_bytes()
    Path("d/02.png").write_bytes(data[: len(data) // 2])
    start(pictures)
    assert set(json.loads(Path("out.json").read_text())) == {"00", "01", "03"}
    assert "1 pictures are left out, they cannot be read: d/02.png" in caplog.text
    for name in ("00", "01", "03"):
        Path(f"d/{name}.png").write_bytes(b"no picture")
        Path(f"d/{name}.npz").unlink()
    with pytest.raises(UserError, match="no picture in d could be used"):
        start(pictures)


def test_a_stopped_run_writes_what_is_done_and_goes_on(pictures, calls, monkeypatch):
    encode = Stub.encode

    def stopping(self, batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(Stub, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        start(pictures)
    done = set(json.loads(Path("out.json").read_text()))
    assert done and done == {path.stem for path in Path("d").glob("*.npz")}
    monkeypatch.setattr(Stub, "encode", encode)
    calls.clear()
    start([*pictures, "--skip_existing"] if "--skip_existing" not in pictures else pictures)
    assert len(calls) == 4 - len(done)
    assert set(json.loads(Path("out.json").read_text())) == {"00", "01", "02", "03"}


def test_an_edited_picture_is_encoded_again_with_skip_existing(pictures, calls):
    start(pictures)
    gradient(Path("d/01.png"), (90, 120))
    calls.clear()
    start(pictures)
    assert len(calls) == 1


@pytest.mark.parametrize("given", [["--alpha_mask"], ["--alpha_mask", "1"], ["--alpha_mask", "--skip_existing"]])
def test_alpha_masks(pictures, calls, given):
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save("d/00.png")
    start([*pictures, *given])
    with np.load("d/00.npz") as file:
        assert np.allclose(file["alpha_mask"], pixels[..., 3] / 255)
    with np.load("d/01.npz") as file:
        assert file["alpha_mask"].min() == 1
    if "--skip_existing" in given:
        calls.clear()
        start([*pictures, *given])
        assert not calls


def test_pictures_with_one_name(pictures, calls, caplog):
    gradient(Path("d/00.webp"), (64, 64))
    start(pictures)
    assert "d/00.png and d/00.webp would share d/00.npz: the second is used" in caplog.text


def test_values_that_are_not_finite_stop_with_the_name(pictures, calls, monkeypatch):
    encode = Stub.encode

    def spoiled(self, batch):
        found = encode(self, batch)
        found.latent_dist.mean = found.latent_dist.mean * torch.nan
        return found

    monkeypatch.setattr(Stub, "encode", spoiled)
    with pytest.raises(UserError, match=r"no finite latents for .*\.png"):
        start(pictures)
    assert json.loads(Path("out.json").read_text()) == {} and not list(Path("d").glob("*.npz"))
