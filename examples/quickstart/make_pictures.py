"""Draws the 12 captioned pictures of `pictures/` that teach the demo's LoRA a heart.

python examples/quickstart/make_pictures.py
"""

from __future__ import annotations

import random
from pathlib import Path

import shapes

FOLDER = Path(__file__).parent / "pictures" / "16_heart"
COUNT = 12


def main() -> None:
    rng = random.Random(7)
    pairs = [(color, background) for color in shapes.COLORS for background in shapes.BACKGROUNDS]
    # every colour and every background at least twice, 18 of the 30 pairs never
    rng.shuffle(pairs)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < COUNT:
        uses = [name for pair in chosen for name in pair]
        chosen.append(min(pairs, key=lambda pair: (pair in chosen, uses.count(pair[0]) + uses.count(pair[1]))))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (color, background) in enumerate(chosen):
        look = shapes.Look(shapes.NEW_SHAPE, color, background)
        shapes.draw(look, rng).save(FOLDER / f"{number:02d}.png")
        (FOLDER / f"{number:02d}.txt").write_text(look.caption, encoding="utf-8")


if __name__ == "__main__":
    main()
