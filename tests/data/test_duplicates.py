"""Duplicates: files with the same bytes, and pictures that look the same."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from library.data.duplicates import Look, exact_groups, look_at_all, similar_groups
from library.data.manifest import manifest_hash
from library.data.records import Item


def drawing(seed: int) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (160, 120), tuple(rng.choices(range(256), k=3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(140), rng.randrange(100)
        draw.ellipse((x, y, x + rng.randrange(10, 60), y + rng.randrange(10, 60)), tuple(rng.choices(range(256), k=3)))
    return image


def test_same_bytes_and_same_looks(tmp_path):
    for seed in range(6):
        drawing(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    drawing(1).save(tmp_path / "again.jpg", quality=70)
    drawing(2).resize((80, 60)).save(tmp_path / "small.webp")
    drawing(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    stretched = drawing(4).resize((160, 240))
    stretched.save(tmp_path / "stretched.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "5.png").read_bytes()[:300])
    names = sorted(path.name for path in tmp_path.iterdir())
    done = []
    looks = look_at_all([str(tmp_path / name) for name in [*names, "missing.png"]], lambda: done.append(1))
    assert len(done) == len(names) + 1
    assert [[names[i] for i in group] for group in exact_groups(looks)] == [["0.png", "copy.png"]]
    similar = {frozenset(names[i] for i in group) for group in similar_groups(looks)}
    assert similar == {frozenset(("1.png", "again.jpg")), frozenset(("2.png", "small.webp"))}
    broken = {name: look.error for name, look in zip([*names, "missing.png"], looks, strict=True) if look.error}
    assert set(broken) == {"broken.png", "missing.png"}
    assert "No such file" in broken["missing.png"]


def test_a_near_pair_is_found_in_a_crowd():
    rng = np.random.default_rng(0)
    smalls = [np.full((9, 9, 3), i % 200, dtype=np.uint8) for i in range(0, 3000, 10)]
    smalls += list(rng.integers(0, 255, (3000, 9, 9, 3), dtype=np.uint8))
    near = smalls[2000].astype(int) + rng.integers(-2, 3, (9, 9, 3))
    looks = [Look(str(i), small) for i, small in enumerate([*smalls, near.clip(0, 255).astype(np.uint8)])]
    assert similar_groups(looks) == [[2000, len(smalls)]], "and none of the flat ones"


def test_manifest_hash_names_the_pictures_not_their_place(tmp_path):
    def items(root, caption="a cat", repeats=2):
        folder = tmp_path / root / "10_cat"
        folder.mkdir(parents=True, exist_ok=True)
        result = []
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(b"x" * 10)
            path = str(folder / name)
            result.append(Item(path, path, caption, (64, 64), repeats, bucket=(64, 64)))
        return result

    first = manifest_hash(items("here"))
    assert len(first) == 64
    assert manifest_hash(reversed(items("there"))) == first
    assert manifest_hash(items("here", caption="a dog")) != first
    assert manifest_hash(items("here", repeats=3)) != first
    assert manifest_hash(items("here")[:1]) != first
    changed = items("here")
    (tmp_path / "here/10_cat/a.png").write_bytes(b"x" * 11)
    assert manifest_hash(changed) != first
