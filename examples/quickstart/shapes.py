"""Draws the captioned pictures that the shipped model was trained on, and judges pictures of that kind.

A picture is one shape in one colour on one background: "a red star on a black background". `heart` is the
shape that the shipped model has never seen and the demo teaches.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NEW_SHAPE = "heart"
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "pink": (250, 180, 200),
    "teal": (20, 120, 125),
}
OVERSAMPLING = 4


@dataclass(frozen=True)
class Look:
    """What a picture shows."""

    shape: str
    color: str
    background: str

    @property
    def caption(self) -> str:
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.shape} on a {self.background} background"


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corner points of a shape around (x, y) with radius r; circles and rings have none."""

    def polar(angles_radii: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + r * q * math.cos(a), y + r * q * math.sin(a)) for a, q in angles_radii]

    if shape == "square":
        s = 0.82 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return polar([(-math.pi / 2 + k * 2 * math.pi / 3, 1.1) for k in range(3)])
    if shape == "star":
        return polar([(-math.pi / 2 + k * math.pi / 5, 1.15 if k % 2 == 0 else 0.46) for k in range(10)])
    if shape == "cross":
        t = 0.34 * r
        return [
            *[(x - t, y - r), (x + t, y - r), (x + t, y - t), (x + r, y - t), (x + r, y + t), (x + t, y + t)],
            *[(x + t, y + r), (x - t, y + r), (x - t, y + t), (x - r, y + t), (x - r, y - t), (x - t, y - t)],
        ]
    if shape == "heart":
        points = []
        for k in range(120):
            t = 2 * math.pi * k / 120
            px = 16 * math.sin(t) ** 3
            py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((x + r * px / 15.5, y - r * (py + 2.5) / 15.5))
        return points
    raise ValueError(f"no outline for {shape}")


def draw(look: Look, rng: random.Random, size: int = 64) -> Image.Image:
    """One picture, `size` pixels a side; position and radius vary with `rng`."""
    side = size * OVERSAMPLING
    r = side * rng.uniform(0.26, 0.36)
    x, y = (side * (0.5 + rng.uniform(-0.1, 0.1)) for _ in range(2))
    picture = Image.new("RGB", (side, side), BACKGROUNDS[look.background])
    pen = ImageDraw.Draw(picture)
    fill = COLORS[look.color]
    if look.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if look.shape == "ring":
            q = 0.55 * r
            pen.ellipse((x - q, y - q, x + q, y + q), fill=BACKGROUNDS[look.background])
    else:
        pen.polygon(outline(look.shape, x, y, r), fill=fill)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def random_look(rng: random.Random, shapes: tuple[str, ...] = SHAPES) -> Look:
    """A shape, colour and background drawn evenly."""
    return Look(rng.choice(shapes), rng.choice(list(COLORS)), rng.choice(list(BACKGROUNDS)))


def _nearest(pixel: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.sum((pixel - np.array(palette[name])) ** 2)))


def _normalised_mask(mask: np.ndarray, side: int = 32) -> np.ndarray | None:
    """The mask's bounding square scaled to `side`, or None when there is hardly anything in it."""
    rows, columns = np.where(mask)
    if len(rows) < 40:
        return None
    top, left = rows.min(), columns.min()
    reach = max(rows.max() - top, columns.max() - left) + 1
    square = np.zeros((reach, reach), np.uint8)
    part = mask[top : top + reach, left : left + reach]
    dy, dx = (reach - (rows.max() - top + 1)) // 2, (reach - (columns.max() - left + 1)) // 2
    part = mask[top : rows.max() + 1, left : columns.max() + 1]
    square[dy : dy + part.shape[0], dx : dx + part.shape[1]] = part * 255
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BOX)) / 255.0


def _templates() -> dict[str, np.ndarray]:
    result = {}
    for shape in (*SHAPES, NEW_SHAPE):
        picture = draw(Look(shape, "red", "white"), random.Random(0), 128)
        mask = np.abs(np.asarray(picture, np.int32) - np.array(BACKGROUNDS["white"])).sum(2) > 150
        template = _normalised_mask(mask)
        assert template is not None
        result[shape] = template
    return result


_cached_templates: dict[str, np.ndarray] = {}


def judge(picture: Image.Image) -> Look | None:
    """What a picture shows, from its pixels alone; None when no shape stands out.

    Background: the median of the border. Shape: the pixels far from it, laid over one template per shape
    (intersection over union). Colour: their median.
    """
    if not _cached_templates:
        _cached_templates.update(_templates())
    pixels = np.asarray(picture.convert("RGB"), np.int32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    mask = np.sqrt(((pixels - ground) ** 2).sum(2)) > 60
    normalised = _normalised_mask(mask)
    if normalised is None:
        return None

    def overlap(template: np.ndarray) -> float:
        return float(np.minimum(normalised, template).sum() / np.maximum(normalised, template).sum())

    shape = max(_cached_templates, key=lambda name: overlap(_cached_templates[name]))
    color = np.median(pixels[mask], axis=0)
    return Look(shape, _nearest(color, COLORS), _nearest(ground, BACKGROUNDS))
