"""Pixels, crops and crop numbers against the original's."""

from __future__ import annotations

import json
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from library.data import images
from library.data.buckets import crop_ltrb
from library.data.classic import trim_and_resize_if_required
from library.messages import UserError

LATER = {"lanczos_12x20"}  # resizing of conditioning pictures: ControlNet data sets come with a later issue


@pytest.fixture(scope="module")
def crops(golden):
    return json.loads((golden / "datasets_crop.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pixels(golden):
    with np.load(golden / "datasets_pixels.npz") as file:
        return {name: file[name] for name in file.files}


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def gradient(size):
    """A picture whose red and green say where a pixel was."""
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width) % 256
    picture[..., 1] = np.arange(height)[:, None] % 256
    picture[..., 2] = (np.arange(width) // 256) * 16 + (np.arange(height) // 256)[:, None]
    return picture


def test_every_golden_array_is_compared(pixels):
    index = json.loads(pixels["coloraug_index"].tobytes())
    augmented = {f"coloraug_seed{e['seed']}_{e['kind']}" for e in index if e["kind"] != "none"}
    areas = {name for name in pixels if name.startswith("area_")}
    assert set(pixels) >= LATER
    assert set(pixels) == augmented | areas | LATER | {"img", "tensor_chw", "coloraug_index"}


def test_area_resizing(pixels):
    for name in (name for name in pixels if name.startswith("area_")):
        width, height = map(int, name.rpartition("_")[2].split("x"))
        assert difference(images.resize(pixels["img"], (width, height)), pixels[name]) <= 1, name


def test_color_augmentation_draws_and_pixels(pixels):
    for entry in json.loads(pixels["coloraug_index"].tobytes()):
        kind = entry["kind"]
        expected = pixels["img"] if kind == "none" else pixels[f"coloraug_seed{entry['seed']}_{kind}"]
        draw = random.Random(entry["seed"])
        assert difference(images.augment_color(pixels["img"], draw), expected) <= 1, entry
        reference = random.Random(entry["seed"])
        for _ in entry["draws"]:
            reference.random()
        assert draw.random() == reference.random(), f"{entry} drew another number of values"


def test_tensor(pixels):
    tensor = images.to_tensor(pixels["img"])
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    np.testing.assert_allclose(tensor.numpy(), pixels["tensor_chw"], atol=1e-6)


def test_centre_crop_and_size_numbers(crops):
    wrong = []
    for case in crops["cases"]:
        size, bucket, resized = (tuple(case[name]) for name in ("image", "bucket", "resized"))
        ltrb = crop_ltrb(bucket, size)
        if ltrb != pytest.approx(tuple(case["crop_ltrb"]), rel=1e-9, abs=1e-9):
            wrong.append((case, ltrb))
        offset = tuple((a - b) // 2 for a, b in zip(resized, bucket, strict=True))
        if list(offset) != case["trim_left_top"]:
            wrong.append((case, offset))
        for name, flipped in (("normal", False), ("flipped", True)):
            told = case[name]
            assert told["original_size_hw"] == list(size[::-1])
            assert told["target_size_hw"] == list(bucket[::-1]) == told["image_shape"][2:]
            if list(images.crop_top_left(ltrb, bucket, flipped)) != told["crop_top_left"]:
                wrong.append((case, name))
    assert not wrong


def test_centre_crop_takes_the_middle(crops):
    for case in crops["cases"][::30]:
        bucket, resized = tuple(case["bucket"]), tuple(case["resized"])
        picture = gradient(resized)
        cut, offset = images.crop_to_bucket(picture, bucket, resized)
        left, top = case["trim_left_top"]
        assert offset == (left, top)
        assert np.array_equal(cut, picture[top : top + bucket[1], left : left + bucket[0]])


def test_random_crop(crops):
    for case in crops["random_crop"]:
        bucket, resized = tuple(case["bucket"]), tuple(case["resized"])
        picture = gradient(tuple(case["image"]))
        cut, offset = images.crop_to_bucket(picture, bucket, resized, draw=random.Random(case["seed"]))
        drawn = [draw[-1] for draw in case["draws"]]
        moved = [o for o, a, b in zip(offset, resized, bucket, strict=True) if a > b]
        assert moved == drawn, case
        assert list(cut.shape) == case["out_shape"]
        random.seed(case["seed"])
        same, original, ltrb = trim_and_resize_if_required(True, picture, bucket, resized)
        assert np.array_equal(same, cut)
        assert list(original) == case["original_size"]
        assert ltrb == pytest.approx(tuple(case["crop_ltrb"]), rel=1e-9, abs=1e-9)


def test_face_crop(crops):
    for case in crops["face_crop"]:
        base = tuple(case["resolution"])
        draw = random.Random(case["seed"])
        cut, scaled, offset = images.crop_around_face(
            np.zeros((case["image"][1], case["image"][0], 3), np.uint8),
            base,
            images.Face(*case["face"]),
            tuple(case["face_crop_aug_range"]),
            draw,
            random_crop=case["random_crop"],
        )
        assert [list(scaled), list(offset)] == [case["resized"], case["crop_left_top"]], case
        assert list(cut.shape[:2]) == case["out_shape"]


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_480_300_120_140.png", images.Face(480, 300, 120, 140)),
        ("a_b_480_300_120_140.png", images.Face(480, 300, 120, 140)),
        ("480_300_120_140.png", None),
        ("a_b_300_120_140.png", None),
        ("a_480_300_0_0.png", None),
        ("a_0_300_20_20.png", None),
    ],
)
def test_face_in_file_name(name, face):
    assert images.face_in_name(f"folder_1_2_3_4/{name}") == face


def test_without_buckets_the_size_must_fit():
    picture = gradient((70, 60))
    assert images.crop_exact(picture, (70, 60), None, "p.png") is picture
    cut = images.crop_exact(picture, (64, 50), random.Random(1), "p.png")
    reference = random.Random(1)
    top, left = reference.randint(0, 10), reference.randint(0, 6)  # height first
    assert np.array_equal(cut, picture[top : top + 50, left : left + 64])
    with pytest.raises(UserError, match=r"p\.png is 70x60"):
        images.crop_exact(picture, (64, 50), None, "p.png")
    with pytest.raises(UserError, match=r"p\.png is 70x60"):
        images.crop_exact(picture, (64, 64), random.Random(1), "p.png")


def test_no_crop_is_told_without_buckets():
    assert images.crop_top_left(None, (64, 64), flipped=True) == (0, 0)


def test_interpolations():
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    larger, smaller = (90, 64), (30, 24)

    def opencv(size, method):
        return cv2.resize(picture, size, interpolation=method)

    def pillow(size):
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))

    assert np.array_equal(images.resize(picture, larger), opencv(larger, cv2.INTER_AREA))
    assert np.array_equal(images.resize(picture, larger, "auto"), pillow(larger))
    assert np.array_equal(images.resize(picture, smaller, "auto"), opencv(smaller, cv2.INTER_AREA))
    assert np.array_equal(images.resize(picture, smaller, "lanczos"), pillow(smaller))
    assert np.array_equal(images.resize(picture, larger, "nearest"), opencv(larger, cv2.INTER_NEAREST_EXACT))
    for name, method in (("linear", cv2.INTER_LINEAR), ("cubic", cv2.INTER_CUBIC)):
        assert np.array_equal(images.resize(picture, larger, name), opencv(larger, method))
        assert np.array_equal(images.resize(picture, larger, f"bi{name}"), opencv(larger, method))
    with pytest.raises(UserError, match="resize_interpolation"):
        images.resize(picture, larger, "sinc")


def test_reading_modes(tmp_path):
    def read(picture, **options):
        path = tmp_path / f"p.{picture.mode[:1].lower()}.png"
        picture.save(path, **options)
        return images.read_image(path), images.read_image(path, alpha=True)

    grey = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    rgb, rgba = read(grey)
    assert rgb.tolist() == [[[v] * 3 for v in row] for row in [[0, 100], [200, 255]]]
    assert (rgba[..., 3] == 255).all() and np.array_equal(rgba[..., :3], rgb)

    clear = Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8), "RGBA")
    rgb, rgba = read(clear)
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]]  # colours under transparency stay
    assert rgba[..., 3].tolist() == [[0, 128]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    rgb, rgba = read(palette, transparency=1)
    assert rgb.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert rgba[..., 3].tolist() == [[255, 0]]

    deep = Image.fromarray(np.array([[0, 1000], [0x8000, 0xFFFF]], np.uint16))
    rgb, rgba = read(deep)  # the upper 8 bits; clipped by Pillow, and so nearly white, in the original
    assert rgb.tolist() == [[[v] * 3 for v in row] for row in [[0, 3], [128, 255]]]
    assert (rgba[..., 3] == 255).all()


def test_pixels_are_as_stored_unless_a_turn_is_asked_for(tmp_path):
    picture = Image.fromarray(gradient((20, 10)))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(images.read_image(tmp_path / "turned.png"), gradient((20, 10)))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png"):
        images.read_image(path)
    with pytest.raises(UserError, match=r"absent\.png"):
        images.read_image(tmp_path / "absent.png")


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"half\.png"):
        images.read_image(path)
