"""How fast a data set of many small pictures is opened and sorted into buckets, against Pillow in one process.

    python benchmarks/scan.py [--pictures 20000]

Makes the pictures (half PNG, half JPEG) in a temporary folder and times, in process CPU time, best of three:
opening each with Pillow for its size; the same with the caption files read beside it; and what this program does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data import sources
from library.data.buckets import bucket_rule, sort_into_buckets
from library.data.records import DatasetSettings, SubsetSettings

RESOLUTION = (64, 64)
LIMITS = {"smallest": 32, "largest": 128, "step": 8}
REPEATS = 3


def make_pictures(folder: Path, count: int) -> None:
    """Pictures of 40 sizes with one caption file each."""
    for index in range(count):
        size = (48 + index % 8 * 8, 48 + index % 5 * 8)
        suffix = "png" if index % 2 else "jpg"
        Image.new("RGB", size, (index % 256, 90, 30)).save(folder / f"{index:06}.{suffix}")
        (folder / f"{index:06}.txt").write_text("a picture, small, of one colour", encoding="utf-8")


def with_pillow(folder: Path) -> int:
    """Open each picture for its size."""
    names = sorted(name for name in os.listdir(folder) if not name.endswith(".txt"))
    seen = 0
    for name in names:
        with Image.open(os.path.join(folder, name)) as image:
            seen += image.size[0] > 0
    return seen


def with_pillow_and_captions(folder: Path) -> int:
    """The same, and read the first line of each caption file."""
    names = sorted(name for name in os.listdir(folder) if not name.endswith(".txt"))
    seen = 0
    for name in names:
        path = os.path.join(folder, name)
        with Image.open(path) as image:
            seen += image.size[0] > 0
        caption = os.path.splitext(path)[0] + ".txt"
        if os.path.isfile(caption):
            with open(caption, encoding="utf-8") as file:
                file.readline().strip()
    return seen


def scan_and_bucket(folder: Path, caption_extension: str) -> int:
    """What this program does before training: list, read, count tags, choose buckets."""
    subset = SubsetSettings(image_dir=str(folder), caption_extension=caption_extension, class_tokens="picture")
    found = sources.scan(DatasetSettings(resolution=RESOLUTION, subsets=(subset,)))
    rule = bucket_rule(RESOLUTION, enable=True, **LIMITS)
    fits = [rule.fit(item.size) for item in found.items]
    buckets = sort_into_buckets([fit for fit in fits if fit], [item.repeats for item in found.items])
    return sum(len(members) for members in buckets.members)


def seconds(function: Callable[[], int], expected: int) -> float:
    """Best process CPU time of three runs; the result must be the number of pictures."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        count = function()
        best = min(best, time.process_time() - start)
        assert count == expected, f"{count} pictures instead of {expected}"
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    count = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, count)
        pillow = seconds(lambda: with_pillow(folder), count)
        pillow_captions = seconds(lambda: with_pillow_and_captions(folder), count)
        captions = seconds(lambda: scan_and_bucket(folder, ".txt"), count)
        for path in folder.glob("*.txt"):
            path.unlink()
        plain = seconds(lambda: scan_and_bucket(folder, ".txt"), count)
    rows = [
        ("sizes and buckets", pillow, plain),
        ("sizes, captions and buckets", pillow_captions, captions),
    ]
    for title, theirs, ours in rows:
        print(
            f"{title}: Pillow {theirs / count * 1e6:.1f} us a picture, here {ours / count * 1e6:.1f} us, "
            f"{theirs / ours:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
