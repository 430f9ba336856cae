"""Draws the captioned pictures that the base model is trained on.

python examples/quickstart/make_model/draw_pictures.py --output pictures/1_shapes --count 5120
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5120)
    args = parser.parse_args()

    rng = random.Random(1)
    args.output.mkdir(parents=True, exist_ok=True)
    for number in range(args.count):
        look = shapes.random_look(rng)
        shapes.draw(look, rng).save(args.output / f"{number:05d}.png")
        (args.output / f"{number:05d}.txt").write_text(look.caption, encoding="utf-8")


if __name__ == "__main__":
    main()
