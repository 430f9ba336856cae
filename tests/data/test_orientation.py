"""EXIF orientation: read as Pillow reads it, and applied to size, bucket, pixels and cache alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from library.data.cache import cache_latents
from library.data.image_size import size_and_orientation
from library.data.images import read_image
from library.data.latents_file import read_header
from library.data.orientation import orientation_of, turn, turned_size
from tests.data.conftest import block_means, same

KINDS = ["JPEG", "PNG", "WEBP", *(["AVIF"] if features.check("avif") else [])]


def photograph(path: Path, orientation: int, size: tuple[int, int] = (160, 96), kind: str = "PNG") -> np.ndarray:
    """A noisy picture with an orientation; gives what a viewer would see."""
    pixels = np.random.default_rng(orientation).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, kind, exif=exif.tobytes())
    with Image.open(path) as file:
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_as_pillow_has_it(data: st.DataObject, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    exif = Image.Exif()
    exif[0x0112] = data.draw(st.sampled_from([*range(1, 9), 0, 9, 300]))
    exif[0x010E] = "x" * data.draw(st.sampled_from([0, 10, 9000]))
    exif[0x010F] = "maker"
    options = {"exif": exif.tobytes()}
    if kind in ("JPEG", "WEBP", "PNG") and data.draw(st.booleans()):
        options["icc_profile"] = bytes(data.draw(st.sampled_from([10, 3000, 70000])))
    path = tmp_path / "picture.bin"
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    Image.effect_noise((width, height), 90).convert("RGB").save(path, kind, **options)
    with Image.open(path) as file:
        seen = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    size, orientation = size_and_orientation(path)
    assert orientation == orientation_of(path)
    assert np.array_equal(read_image(path, orientation=orientation), seen)
    assert turned_size(size, orientation) == (seen.shape[1], seen.shape[0])


def test_big_endian_and_broken_entries(tmp_path: Path) -> None:
    def with_exif(body: bytes) -> int:
        path = tmp_path / "x.jpg"
        segment = b"Exif\0\0" + body
        path.write_bytes(b"\xff\xd8\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + b"\xff\xda")
        return orientation_of(path)

    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    assert with_exif(b"MM\0*\0\0\0\x08\0\x01" + entry) == 6
    assert with_exif(b"MM\0*\0\0\0\x08\xff\xff" + entry) == 6  # more entries promised than there are
    assert with_exif(b"MM\0*\xff\xff\xff\xff\0\x01" + entry) == 1
    assert with_exif(b"MM\0*\0\0\0\x08\0\x01" + entry.replace(b"\x00\x03", b"\x00\x02", 1)) == 1
    assert with_exif(b"nothing of the kind") == 1
    assert with_exif(b"") == 1


def test_turning_keeps_the_alpha_channel_beside_its_pixels() -> None:
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for orientation in range(1, 9):
        turned = turn(pixels, orientation)
        assert turned.flags["C_CONTIGUOUS"]
        assert {tuple(p) for p in turned.reshape(-1, 4)} == {tuple(p) for p in pixels.reshape(-1, 4)}
        assert (turned.shape[1], turned.shape[0]) == turned_size((3, 2), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_trains_as_it_is_seen(tmp_path: Path, make_group, orientation: int) -> None:
    """The batch equals that of a picture stored upright: bucket, pixels and the sizes that SDXL is told."""
    turned, upright = tmp_path / "turned", tmp_path / "upright"
    turned.mkdir(), upright.mkdir()
    seen = photograph(turned / "a.png", orientation)
    Image.fromarray(seen).save(upright / "a.png")
    batches = [make_group(folder, num_repeats=1)[0] for folder in (turned, upright)]
    for batch in batches:
        assert batch.pop("image_keys")
    assert same(*batches)


def test_opt_out_uses_the_stored_pixels(tmp_path: Path, make_group) -> None:
    turned, stored = tmp_path / "turned", tmp_path / "stored"
    turned.mkdir(), stored.mkdir()
    photograph(turned / "a.png", 6)
    Image.fromarray(read_image(turned / "a.png")).save(stored / "a.png")
    batches = [make_group(folder, num_repeats=1, ignore_exif_orientation=True)[0] for folder in (turned, stored)]
    for batch in batches:
        assert batch.pop("image_keys")
    assert same(*batches)
    assert batches[0]["original_sizes_hw"].tolist() == [[96, 160]]


@pytest.mark.parametrize("orientation", [2, 6])
def test_a_cache_of_the_other_way_is_made_anew(tmp_path: Path, make_group, orientation: int) -> None:
    photograph(tmp_path / "a.png", orientation, (128, 128))

    def cached(**settings: bool):
        group = make_group(tmp_path, num_repeats=1, **settings)
        report = cache_latents(group.datasets, block_means, to_disk=True)
        return group[0]["latents"], report

    turned, report = cached()
    assert (report.made, report.rebuilt.total()) == (1, 0)
    assert read_header(tmp_path / "a.npz").key["orientation"] == orientation
    assert cached()[1].kept == 1
    stored, report = cached(ignore_exif_orientation=True)
    assert dict(report.rebuilt) == {"turned otherwise": 1}
    assert not np.array_equal(turned, stored)
    assert "orientation" not in read_header(tmp_path / "a.npz").key
    again, report = cached()
    assert report.rebuilt.total() == 1
    assert np.array_equal(again, turned)


def test_a_cache_of_another_program_holds_stored_pixels(tmp_path: Path, make_group) -> None:
    photograph(tmp_path / "a.png", 3, (128, 128))
    group = make_group(tmp_path, num_repeats=1)
    cache_latents(group.datasets, block_means, to_disk=True)
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "cache_key"}
    np.savez(tmp_path / "a.npz", **arrays)
    report = cache_latents(make_group(tmp_path, num_repeats=1).datasets, block_means, to_disk=True)
    assert dict(report.rebuilt) == {"turned otherwise": 1}
    np.savez(tmp_path / "a.npz", **arrays)
    unturned = make_group(tmp_path, num_repeats=1, ignore_exif_orientation=True)
    assert cache_latents(unturned.datasets, block_means, to_disk=True).kept == 1


def test_the_information_file_holds_stored_sizes(tmp_path: Path, make_group) -> None:
    photograph(tmp_path / "a.png", 6)
    first = make_group(tmp_path, cache_info=True).datasets[0].items[0]
    path = tmp_path / "metadata_cache.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["resolution"] for entry in entries.values()] == [[160, 96]]
    again = make_group(tmp_path, cache_info=True).datasets[0].items[0]
    assert (again.size, again.orientation) == (first.size, first.orientation) == ((96, 160), 6)
    stored = make_group(tmp_path, cache_info=True, ignore_exif_orientation=True).datasets[0].items[0]
    assert (stored.size, stored.orientation) == ((160, 96), 1)
    for entry in entries.values():  # as another program writes it
        del entry["orientation"]
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert make_group(tmp_path, cache_info=True).datasets[0].items[0].orientation == 6
