"""Puts pictures side by side: what the model drew without the LoRA, and what it draws with it.

python examples/quickstart/compare.py --before FOLDER --after FOLDER --prompts prompts.txt --output before_after.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, CAPTION = 160, 12, 34
INK, PAPER = (30, 30, 30), (255, 255, 255)


def pictures_in(folder: Path, count: int) -> list[Image.Image]:
    files = sorted(folder.glob("*.png"))[-count:]
    return [Image.open(file).convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS) for file in files]


def sheet(rows: list[tuple[str, list[Image.Image]]], captions: list[str]) -> Image.Image:
    """One row a folder, one column a prompt, captions below."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(12)
    columns = len(captions)
    width = MARGIN + columns * (CELL + MARGIN)
    height = MARGIN + len(rows) * (CELL + MARGIN + 26) + CAPTION
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    y = MARGIN
    for title, pictures in rows:
        pen.text((MARGIN, y), title, INK, font)
        y += 26
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (MARGIN + column * (CELL + MARGIN), y))
        y += CELL + MARGIN
    for column, caption in enumerate(captions):
        pen.multiline_text((MARGIN + column * (CELL + MARGIN), y), two_lines(caption), INK, small)
    return canvas


def grid(pictures: list[Image.Image], captions: list[str], columns: int = 6) -> Image.Image:
    """Pictures in rows, each with its caption below."""
    small = ImageFont.load_default(12)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), MARGIN + rows * (CELL + CAPTION + MARGIN)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = MARGIN + number % columns * (CELL + MARGIN)
        y = MARGIN + number // columns * (CELL + CAPTION + MARGIN)
        canvas.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + CELL + 2), two_lines(caption), INK, small)
    return canvas


def two_lines(caption: str) -> str:
    words = caption.split()
    return " ".join(words[:3]) + "\n" + " ".join(words[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    captions = [line.split(" --")[0] for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [
        ("without the LoRA", pictures_in(args.before, len(captions))),
        ("with the LoRA", pictures_in(args.after, len(captions))),
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, captions).save(args.output)


if __name__ == "__main__":
    main()
