"""Makes the pictures of docs/datasets.md from examples/quickstart/pictures, with the toolkit itself.

    python docs/images/make_dataset_pictures.py

`dataset_report.webp` is a screenshot and is only made where Chromium is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parent.parent
sys.path.insert(0, str(ROOT))

from library.data.debug import debug_dataset  # noqa: E402
from library.data.group import build_group  # noqa: E402
from library.data.inspection import Run, inspect  # noqa: E402
from library.data.inspection_page import make_page  # noqa: E402
from library.data.records import DatasetSettings, SubsetSettings  # noqa: E402
from library.data.sheets import with_mask  # noqa: E402
from library.data.sources import scan  # noqa: E402

HEARTS = ROOT / "examples" / "quickstart" / "pictures" / "16_heart"
SCALE = 4  # the shipped pictures are 64x64
SHAPES = ((400, 270), (270, 400), (260, 260))

FIRST_ROW = 340  # height of a sheet's title and first row


def make_data() -> Path:
    """Hearts on grounds of three shapes, with captions, in a folder of the usual form."""
    target = Path("pictures") / "2_heart"  # relative, so that the report shows a plain path
    target.mkdir(parents=True)
    for number, path in enumerate(sorted(HEARTS.glob("*.png"))):
        with Image.open(path) as heart:
            large = heart.convert("RGB").resize((64 * SCALE, 64 * SCALE), Image.Resampling.LANCZOS)
        width, height = SHAPES[number % len(SHAPES)]
        picture = Image.new("RGB", (width, height), large.getpixel((2, 2)))
        picture.paste(large, ((width - large.width) // 2, (height - large.height) // 2))
        picture.save(target / path.name)
        shutil.copy(path.with_suffix(".txt"), target)
    return target


def settings_of(folder: Path) -> DatasetSettings:
    """One folder in buckets."""
    subset = SubsetSettings(
        image_dir=str(folder), num_repeats=2, class_tokens="heart", caption_extension=".txt", flip_aug=True
    )
    return DatasetSettings(
        resolution=(256, 256),
        batch_size=4,
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=512,
        subsets=(subset,),
    )


def make_sheets(data: Path, folder: Path) -> None:
    """The first row of each sheet of --debug_dataset, one below the other."""
    settings = settings_of(data)
    group = build_group([settings], [scan(settings)], tokenize=None, seed=1)
    debug_dataset(group, folder=folder / "debug_dataset")
    sheets = [Image.open(path) for path in sorted((folder / "debug_dataset").glob("*.png"))]
    rows = [sheet.crop((0, 0, sheet.width, FIRST_ROW)) for sheet in sheets]
    together = Image.new("RGB", (max(row.width for row in rows), FIRST_ROW * len(rows)), "white")
    for number, row in enumerate(rows):
        together.paste(row, (0, FIRST_ROW * number))
    together.save(IMAGES / "dataset_sheet.webp", quality=75)


def make_mask(data: Path) -> None:
    """A picture, its mask, and the two together as the program shows them."""
    path = sorted(data.glob("*.png"))[2]
    picture = np.asarray(Image.open(path).convert("RGB"))
    mask = (np.abs(picture.astype(int) - picture[2, 2]).sum(axis=2) > 60).astype(np.float32)
    white = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    gap = np.full((picture.shape[0], 8, 3), 255, dtype=np.uint8)
    Image.fromarray(np.hstack([picture, gap, white, gap, with_mask(picture, mask)])).save(
        IMAGES / "dataset_mask.webp", quality=80
    )


def make_report(data: Path, folder: Path) -> None:
    """A screenshot of the page that tools/inspect_dataset.py writes."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    settings = settings_of(data)
    found = scan(settings)
    group = build_group([settings], [found], tokenize=None, seed=1)
    facts = inspect(group, [found], Run(script="train_network.py", max_train_epochs=10), count_tokens=None)
    page = folder / "report.html"
    page.write_text(make_page(facts, group, pictures_per_bucket=6).html(), encoding="utf-8")
    shot = folder / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1560"]
    subprocess.run([browser, *flags, f"--screenshot={shot}", page.as_uri()], capture_output=True, check=True)
    Image.open(shot).convert("RGB").save(IMAGES / "dataset_report.webp", quality=70)


def main() -> None:
    """Make all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        data = make_data()
        make_sheets(data, folder)
        make_mask(data)
        make_report(data, folder)
        os.chdir(ROOT)  # a folder that is in use cannot be removed everywhere


if __name__ == "__main__":
    main()
