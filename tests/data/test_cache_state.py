"""What the caches hold, told without a model."""

from __future__ import annotations

import os
import shutil

import pytest
from PIL import Image

from library.data.cache import cache_latents
from library.data.cache_state import cache_state
from library.data.text_cache import cache_text_outputs
from library.data.text_file import TextOrigin
from tests.data.conftest import block_means
from tests.data.test_text_cache import Encoder


def test_states_before_and_after(shapes, make_group):
    before = {path: path.stat().st_mtime_ns for path in shapes.iterdir()}
    (state,) = cache_state(make_group(shapes).datasets, "sdxl")
    for holdings in (state.latents, state.text):
        assert (holdings.valid, holdings.missing, holdings.stale, holdings.bytes_on_disk) == (0, 6, {}, 0)
    group = make_group(shapes)
    cache_latents(group.datasets, block_means, to_disk=True, family="sdxl", vae="v", dtype="float32")
    cache_text_outputs(group.datasets, Encoder(), TextOrigin(77), to_disk=True)
    made = {path: path.stat().st_mtime_ns for path in shapes.iterdir()}
    needed = state.latents.bytes_needed
    (state,) = cache_state(make_group(shapes).datasets, "sdxl")
    for holdings in (state.latents, state.text):
        assert (holdings.valid, holdings.missing, holdings.stale, holdings.bytes_needed) == (6, 0, {}, 0)
    files = sum(path.stat().st_size for path in shapes.glob("*.npz") if not path.stem.endswith("_te_outputs"))
    assert state.latents.bytes_on_disk == files == pytest.approx(needed, rel=0.05)
    assert {path: path.stat().st_mtime_ns for path in shapes.iterdir()} == made
    assert all(made[path] == stamp for path, stamp in before.items())
    # Files of another family are left alone: those of this one are missing.
    (state,) = cache_state(make_group(shapes).datasets, "sd")
    assert (state.latents.valid, state.latents.missing, state.text) == (0, 6, None)


def test_what_is_stale_is_told_with_its_reason(shapes, make_group):
    def states(**settings):
        return cache_state(make_group(shapes, **settings).datasets)[0].latents

    cache_latents(make_group(shapes).datasets, block_means, to_disk=True)
    Image.new("RGB", Image.open(shapes / "a.png").size, (9, 9, 9)).save(shapes / "a.png")
    (shapes / "b.npz").write_bytes(b"PK")
    (shapes / "c.npz").unlink()
    os.utime(shapes / "d.png", ns=(1, 1))
    state = states()
    assert (state.valid, state.missing) == (3, 1)
    assert dict(state.stale) == {"picture changed": 1, "broken file": 1}
    assert states(resize_interpolation="lanczos").stale["other settings"] == 4
    assert states(sizes=(192,)).missing == 5  # those of the other size stay where they are
    assert cache_state(make_group(shapes, random_crop=True).datasets)[0].latents is None


def test_one_state_for_each_data_set(shapes, make_group, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    first, second = make_group(shapes), make_group(other)
    cache_latents(first.datasets, block_means, to_disk=True)
    states = cache_state([*first.datasets, object(), *second.datasets])
    assert [None if s.latents is None else (s.latents.valid, s.latents.missing) for s in states] == [
        (6, 0),
        None,
        (0, 6),
    ]
