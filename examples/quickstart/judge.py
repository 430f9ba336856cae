"""Measures how well a model follows captions: draws pictures and looks at their pixels.

python examples/quickstart/judge.py --count 60
python examples/quickstart/judge.py --shape heart --network_weights quickstart-output/heart.safetensors
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import shapes

from library import messages
from library.generation.engine import Engine
from library.generation.networks import NetworkSpec, load_networks
from library.generation.request import ImageRequest
from library.models.family import family

STEPS, SCALE = 20, 3.0


def open_engine(model: Path, network: Path | None = None) -> Engine:
    """The engine of a model, with a LoRA applied if one is given."""
    sd = family("sd")
    opened: Any = sd.load(model)
    specs = [NetworkSpec("networks.lora", str(network))] if network else []
    return Engine(sd, opened, sampler="ddim", networks=load_networks(specs, opened))


def draw(engine: Engine, looks: list[shapes.Look], first_seed: int = 100, size: int = 64) -> list[Any]:
    """One picture per look."""
    requests = [
        ImageRequest(prompt=look.caption, width=size, height=size, steps=STEPS, scale=SCALE, seed=first_seed + k)
        for k, look in enumerate(looks)
    ]
    pictures = []
    for start in range(0, len(requests), 30):
        pictures += engine.generate(requests[start : start + 30])
    return pictures


def some_looks(count: int, shape: str | None = None, seed: int = 3) -> list[shapes.Look]:
    """Captions drawn evenly; of one shape if it is named."""
    rng = random.Random(seed)
    return [shapes.random_look(rng, (shape,) if shape else shapes.SHAPES) for _ in range(count)]


def share(looks: list[shapes.Look], pictures: list[Any], *parts: str) -> float:
    """Share of pictures that show what was asked for in the named parts (shape, color, background)."""
    seen = [shapes.judge(picture) for picture in pictures]
    good = [
        found is not None and all(getattr(found, part) == getattr(look, part) for part in parts)
        for found, look in zip(seen, looks, strict=True)
    ]
    return sum(good) / len(good)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--network_weights", type=Path, help="a LoRA to draw with")
    parser.add_argument("--shape", help="draw this shape only")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--sheet", type=Path, help="write the pictures and captions here")
    args = parser.parse_args()

    looks = some_looks(args.count, args.shape)
    pictures = draw(open_engine(args.model, args.network_weights), looks)
    for parts in (("shape",), ("color",), ("background",), ("shape", "color", "background")):
        messages.write(f"{' and '.join(parts)}: {share(looks, pictures, *parts):.0%}")
    if args.sheet:
        from compare import grid

        grid(pictures, [look.caption for look in looks]).save(args.sheet)


if __name__ == "__main__":
    main()
