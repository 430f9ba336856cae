"""Pictures that are the same: byte by byte by a hash of the file, and to the eye by a small picture of each.

The small picture is 9x9 pixels. Its rises and falls between neighbours make a 128-bit hash (a difference hash in
both directions); pairs with nearly the same hash are compared by the colours of the small pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.data.images import has_alpha_channel
from library.data.latents_file import content_hash
from library.data.listing import picture_suffixes

SIDE = 9
# Rise of the three channels' sum that counts, so that noise in flat places does not.
LEAST_RISE = 12
# Bits of 128 that may differ; one of BANDS parts of the hash is then the same in both.
LARGEST_DISTANCE = 7
BANDS = 8
# Spread of brightness, 0 to 255, below which a small picture is too flat to tell anything.
LEAST_CONTRAST = 6.0
# Mean difference of the small pictures' colours, 0 to 255, below which two look the same.
LARGEST_DIFFERENCE = 6.0
# Pictures of one aspect ratio: the larger ratio is at most this many times the smaller.
LARGEST_STRETCH = 1.03
# In a crowd of equal parts only this many neighbours are compared, so that flat pictures do not cost a square.
NEIGHBOURS = 64


@dataclass(frozen=True, slots=True)
class Look:
    """One picture file as it was read.

    Attributes:
        content: hash of the file's bytes; empty if it could not be read.
        small: uint8 (9, 9, 3), or None where the pixels cannot be read.
        ratio: width / height of the pixels.
        transparent: some place is not opaque.
        error: why the pixels cannot be read; empty if they can.
    """

    content: str = ""
    small: np.ndarray | None = None
    ratio: float = 1.0
    transparent: bool = False
    error: str = ""


def look_at(path: str) -> Look:
    """Read a picture file once: its bytes for the hash, its pixels reduced for the small picture."""
    from PIL import Image

    try:
        content = content_hash(path)
    except OSError as error:
        return Look(error=error.strerror or str(error))
    try:
        with Image.open(path) as image:
            ratio = image.width / image.height
            image.draft("RGB", (SIDE * 8, SIDE * 8))  # JPEG decodes to an eighth of its size at once
            image.load()
            transparent = _is_transparent(image)
            small = _flat(image, transparent).resize((SIDE, SIDE), Image.Resampling.BOX)
        return Look(content, np.asarray(small, dtype=np.uint8), ratio, transparent)
    except Exception as error:  # plug-ins raise many kinds
        return Look(content, error=str(error) or type(error).__name__)


def _is_transparent(image: Any) -> bool:
    return has_alpha_channel(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _flat(image: Any, transparent: bool) -> Any:
    """RGB, with transparent places black, so that cut-outs differ."""
    from PIL import Image

    if not transparent:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def look_at_all(paths: Sequence[str], done: Callable[[], None] = lambda: None) -> list[Look]:
    """`look_at` for many files, in threads (decoding and hashing let others run).

    Args:
        paths: the files.
        done: called after each, for a progress bar.
    """
    picture_suffixes()  # teaches Pillow the formats of plug-ins
    looks = []
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        for look in pool.map(look_at, paths):
            looks.append(look)
            done()
    return looks


def exact_groups(looks: Sequence[Look]) -> list[list[int]]:
    """Indices of readable files with the same bytes, two or more each."""
    groups: dict[str, list[int]] = {}
    for index, look in enumerate(looks):
        if look.content and not look.error:
            groups.setdefault(look.content, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def similar_groups(looks: Sequence[Look]) -> list[list[int]]:
    """Indices of pictures that look the same though their files differ, two or more each.

    Files with the same bytes count once, by the first of them. Pictures of nearly one colour are left out.
    """
    first: dict[str, int] = {}
    for index, look in enumerate(looks):
        if look.small is not None and look.small.mean(axis=2).std() >= LEAST_CONTRAST:
            first.setdefault(look.content, index)
    chosen = list(first.values())
    if len(chosen) < 2:
        return []
    smalls = np.stack([small for index in chosen if (small := looks[index].small) is not None])
    ratios = np.array([looks[index].ratio for index in chosen])
    bits = _difference_bits(smalls)
    parent = list(range(len(chosen)))
    for left, right in _candidates(bits):
        near = (bits[left] ^ bits[right]).sum(axis=1) <= LARGEST_DISTANCE
        stretch = np.maximum(ratios[left], ratios[right]) / np.minimum(ratios[left], ratios[right])
        near &= stretch <= LARGEST_STRETCH
        left, right = left[near], right[near]
        colours = np.abs(smalls[left].astype(np.int16) - smalls[right]).mean(axis=(1, 2, 3))
        for a, b in zip(left[colours <= LARGEST_DIFFERENCE], right[colours <= LARGEST_DIFFERENCE], strict=True):
            parent[_root(parent, int(a))] = _root(parent, int(b))
    groups: dict[int, list[int]] = {}
    for position, index in enumerate(chosen):
        groups.setdefault(_root(parent, position), []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


def _difference_bits(smalls: np.ndarray) -> np.ndarray:
    """(n, 9, 9, 3) -> bool (n, 128): brighter than the neighbour to the left, than the one above."""
    grey = smalls.astype(np.int16).sum(axis=3)
    across = grey[:, :-1, 1:] - grey[:, :-1, :-1] > LEAST_RISE
    down = grey[:, 1:, :-1] - grey[:, :-1, :-1] > LEAST_RISE
    return np.concatenate([across.reshape(len(grey), -1), down.reshape(len(grey), -1)], axis=1)


def _candidates(bits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that agree in one part of the hash, as two arrays of positions, part by part."""
    packed = np.packbits(bits, axis=1)
    parts = packed.view(">u2").astype(np.uint16)
    for band in range(BANDS):
        # by this part first, then by the others, so that like stands beside like in a crowd
        order = np.lexsort([*(parts[:, other] for other in range(BANDS) if other != band), parts[:, band]])
        values = parts[order, band]
        for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            same = np.flatnonzero(values[step:] == values[:-step])
            if not len(same):
                break
            yield order[same], order[same + step]


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node
