"""Contact sheets of `--debug_dataset`, and the cells that the data-set report shows."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from library.data.debug import debug_dataset
from library.data.sheets import CELL, cells_of, contact_sheet, name_of


def test_a_sheet_for_each_bucket_is_written(shapes, make_group, tmp_path, caplog):
    group = make_group(shapes)
    folder = tmp_path / "out" / "debug_dataset"
    folder.mkdir(parents=True)
    (folder / "bucket_1x1.png").write_bytes(b"from an earlier run")
    (folder / "mine.png").write_bytes(b"not ours")
    with caplog.at_level("INFO"):
        debug_dataset(group, folder=folder)
    sizes = group.datasets[0].buckets.sizes
    assert len(sizes) > 1
    expected = {f"bucket_{w}x{h}.png" for w, h in sizes} | {"mine.png"}
    assert {path.name for path in folder.iterdir()} == expected
    assert f"contact sheets: {len(sizes)} in {folder}" in caplog.text
    with Image.open(folder / sorted(expected)[0]) as sheet:
        assert sheet.width > CELL and len(sheet.getcolors(1 << 24)) > 50


def test_cells_show_what_the_model_sees(shapes, make_group):
    group = make_group(shapes, flip_aug=True, caption_prefix="a photo,", alpha_mask=True)
    picture = shapes / "000.png" if (shapes / "000.png").exists() else next(shapes.glob("*.png"))
    with Image.open(picture) as image:
        mask = Image.new("L", image.size, 255)
        mask.paste(0, (0, 0, image.width // 2, image.height))
        image.convert("RGB").putalpha(mask)
        rgba = image.convert("RGBA")
        rgba.putalpha(mask)
    rgba.save(picture)
    dataset = group.datasets[0]
    plan = group.plan(7, 1).batches[0]
    cells = [cell for planned in plan for cell in cells_of(dataset.batch(planned, epoch=1, step=0))]
    assert len(cells) == 12 and all(cell.caption.startswith("a photo,") for cell in cells)
    assert {cell.flipped for cell in cells} == {True, False}
    assert {cell.size for cell in cells} == set(dataset.buckets.sizes)
    masked = [cell for cell in cells if cell.masked]
    assert {cell.key for cell in masked} == {str(picture)}
    for cell in masked:
        left = cell.picture[:, : cell.size[0] // 4] if not cell.flipped else cell.picture[:, -cell.size[0] // 4 :]
        assert (left[..., 0].astype(int) - left[..., 1] > 40).mean() > 0.9, "the mask's colour lies over that half"
        assert name_of(cell).startswith(picture.name) and "masked" in name_of(cell)


def test_cells_without_pixels_and_with_conditioning():
    latents = {"captions": ["a"], "latents": torch.zeros(1, 4, 4, 8), "images": None}
    (cell,) = cells_of(latents)
    assert cell.picture is None and cell.size == (64, 32)
    white = torch.ones(1, 3, 16, 16)
    (pair,) = cells_of({"captions": [["x", "y"]], "images": -white, "conditioning_images": white})
    assert pair.caption == "x / y" and not pair.picture.any() and (pair.conditioning == 255).all()
    sheet = np.asarray(contact_sheet([cell, pair], "both"))
    assert (sheet == 0).all(axis=2).any() and sheet.shape[1] > 2 * CELL
