"""Pictures as the model sees them, with their captions: from batches, for the debug view and the data-set report."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from library.runtime.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

# What of a place that a mask leaves out is still shown, and the colour that is laid over it.
MASKED_SHARE = 0.25
MASK_COLOUR = (200, 40, 140)
GROUND, INK, QUIET, RULE = (250, 250, 249), (29, 33, 38), (100, 108, 116), (217, 221, 225)
CELL = 240
TEXT_HEIGHT = 62
MARGIN = 12
COLUMNS = 6
CAPTION_LINES = 3
CAPTION_WIDTH = 38


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of a batch.

    Attributes:
        picture: uint8 (H, W, 3) after crop, resize and flip, places left out by its mask darkened; None where the
            batch holds latents.
        caption: as the text encoder gets it.
        key: names the picture.
        flipped: it is mirrored this time.
        masked: a mask was applied.
        conditioning: uint8 (H, W, 3) of the conditioning picture, or None.
        size: (width, height) that is trained.
    """

    picture: np.ndarray | None
    caption: str
    key: str
    flipped: bool
    masked: bool
    conditioning: np.ndarray | None
    size: tuple[int, int]


def cells_of(batch: Mapping[str, Any]) -> list[Cell]:
    """The pictures of a batch, in order; keys that foreign data sets leave out count as not there."""
    captions = batch["captions"]
    images, masks, guides = batch.get("images"), batch.get("alpha_masks"), batch.get("conditioning_images")
    keys = batch.get("image_keys") or [""] * len(captions)
    flips = batch.get("flippeds") or [False] * len(captions)
    latents = batch.get("latents")
    cells = []
    for i, caption in enumerate(captions):
        picture = None if images is None else pixels_of(images[i])
        masked = masks is not None and bool((masks[i] < 1).any())
        if picture is not None and masks is not None and masked:
            picture = with_mask(picture, masks[i].numpy())
        size = (0, 0)
        if picture is not None:
            size = (picture.shape[1], picture.shape[0])
        elif latents is not None:
            size = (latents.shape[-1] * 8, latents.shape[-2] * 8)
        guide = None if guides is None else pixels_of(guides[i])
        text = caption if isinstance(caption, str) else " / ".join(caption)
        cells.append(Cell(picture, text, str(keys[i]), bool(flips[i]), masked, guide, size))
    return cells


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """float (3, H, W) in [-1, 1] to uint8 (H, W, 3)."""
    return ((image.float().permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)


def with_mask(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with its left-out places dark and coloured.

    Args:
        picture: uint8 (H, W, 3).
        mask: (H, W) in [0, 1]; 1 counts in full.
    """
    kept = MASKED_SHARE + (1 - MASKED_SHARE) * mask[..., None]
    return (picture * kept + np.array(MASK_COLOUR) * (1 - kept)).round().astype(np.uint8)


def thumbnail(picture: np.ndarray, side: int) -> Image.Image:
    """A Pillow picture whose longer side is at most `side`."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def contact_sheet(cells: Sequence[Cell], title: str) -> Image.Image:
    """Pictures in rows with file name and caption below each; a conditioning picture stands beside its picture."""
    from PIL import Image, ImageDraw

    tiles = [(cell, *_tile(cell)) for cell in cells]
    columns = min(COLUMNS, max(1, len(tiles)))
    rows = -(-len(tiles) // columns)
    row_height = CELL + TEXT_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * row_height + 2 * MARGIN + 16), GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), _plain(title), INK)
    for index, (cell, tile, text) in enumerate(tiles):
        left = MARGIN + index % columns * (CELL + MARGIN)
        top = 2 * MARGIN + 16 + index // columns * row_height
        x, y = left + (CELL - tile.width) // 2, top + (CELL - tile.height) // 2
        sheet.paste(tile, (x, y))
        draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=RULE)
        draw.text((left, top + CELL + 3), _plain(name_of(cell))[:CAPTION_WIDTH], QUIET)
        draw.multiline_text((left, top + CELL + 15), _plain(text), INK, spacing=2)
    return sheet


class Sheets:
    """Contact sheets, one a training size, filled batch by batch and written as PNG files.

    Args:
        most: pictures on one sheet; further ones are counted.
    """

    def __init__(self, most: int = 48) -> None:
        self.most = most
        self._cells: dict[tuple[int, int], list[Cell]] = {}
        self._seen: Counter[tuple[int, int]] = Counter()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Take what there is still room for, reduced to the size of the sheet."""
        for cell in cells_of(batch):
            self._seen[cell.size] += 1
            kept = self._cells.setdefault(cell.size, [])
            if len(kept) < self.most:
                kept.append(_reduced(cell))

    def write(self, folder: Path) -> list[Path]:
        """Write `bucket_WIDTHxHEIGHT.png` files; those of an earlier call in this folder go."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if re.fullmatch(r"bucket_\d+x\d+\.png", old.name):
                old.unlink()
        written = []
        for (width, height), cells in sorted(self._cells.items()):
            shown = (
                f"{len(cells)} of {self._seen[width, height]} uses"
                if len(cells) < self._seen[width, height]
                else (f"{len(cells)} uses")
            )
            path = folder / f"bucket_{width}x{height}.png"
            with atomic_path(path) as partial:
                contact_sheet(cells, f"{width}x{height}: {shown}").save(partial, "PNG")
            written.append(path)
        return written


def _reduced(cell: Cell) -> Cell:
    parts = (cell.picture, cell.conditioning)
    picture, guide = (None if part is None else np.asarray(thumbnail(part, CELL)) for part in parts)
    return replace(cell, picture=picture, conditioning=guide)


def name_of(cell: Cell) -> str:
    """File name, and what was done to the picture."""
    marks = [word for word, said in (("flipped", cell.flipped), ("masked", cell.masked)) if said]
    return Path(cell.key).name + (f" ({', '.join(marks)})" if marks else "")


def side_by_side(cell: Cell, side: int) -> Image.Image | None:
    """Thumbnail of the picture, with its conditioning picture to the right of it; None without pixels."""
    from PIL import Image

    if cell.picture is None:
        return None
    if cell.conditioning is None:
        return thumbnail(cell.picture, side)
    parts = [thumbnail(part, side // 2) for part in (cell.picture, cell.conditioning)]
    pair = Image.new("RGB", (sum(part.width for part in parts) + 2, max(part.height for part in parts)), GROUND)
    pair.paste(parts[0], (0, 0))
    pair.paste(parts[1], (parts[0].width + 2, 0))
    return pair


def _tile(cell: Cell) -> tuple[Image.Image, str]:
    from PIL import Image, ImageDraw

    tile = side_by_side(cell, CELL)
    if tile is None:
        tile = Image.new("RGB", (CELL, CELL), (225, 228, 231))
        ImageDraw.Draw(tile).text((MARGIN, CELL // 2), f"cached latents, {cell.size[0]}x{cell.size[1]}", QUIET)
    lines = textwrap.wrap(cell.caption or "(empty caption)", CAPTION_WIDTH) or [""]
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][: CAPTION_WIDTH - 3] + "..."]
    return tile, "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Pillow's built-in font can draw."""
    return text.encode("latin-1", "replace").decode("latin-1")
