"""Picture files: names that never overwrite a picture, and metadata in PNG text chunks."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.generation.request import ImageRequest
from library.messages import UserError
from library.runtime.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

_SEQUENTIAL = re.compile(r"im_(\d{6,})\.png")
STAMP = "%Y%m%d%H%M%S"


def time_stamp() -> str:
    """Local time as it stands in file names."""
    return datetime.datetime.now().strftime(STAMP)


class OutputFolder:
    """Where a run's pictures go.

    Args:
        folder: made if missing.
        sequential: `im_000001.png`, `im_000002.png`, ... after the greatest number that is there already;
            else `im_<time>_<index in the batch>_<seed>.png`.
    """

    def __init__(self, folder: str | Path, *, sequential: bool = False) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder {folder} cannot be made ({error.strerror})", "check --outdir") from error
        self.sequential = sequential
        self._last = max((int(match[1]) for match in map(_SEQUENTIAL.fullmatch, self._names()) if match), default=0)

    def names(self, seeds: list[int]) -> list[Path]:
        """Paths for one batch, from the pictures' seeds."""
        if self.sequential:
            numbers = range(self._last + 1, self._last + 1 + len(seeds))
            self._last += len(seeds)
            return [self.folder / f"im_{number:06d}.png" for number in numbers]
        stamp = time_stamp()
        return [self._free(f"im_{stamp}_{index:03d}_{seed}") for index, seed in enumerate(seeds)]

    def _free(self, stem: str) -> Path:
        path, number = self.folder / f"{stem}.png", 0
        while path.exists():
            number += 1
            path = self.folder / f"{stem}-{number}.png"
        return path

    def _names(self) -> list[str]:
        return [entry.name for entry in self.folder.iterdir()]


def metadata(request: ImageRequest, sampler: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Text chunks of a picture: how it was asked for, in the order that readers of these files know.

    Args:
        sampler: as typed.
        extra: what holds for the whole run (model, networks, ...).
    """
    chunks = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "sampler": sampler,
        "steps": str(request.steps),
        "scale": str(float(request.scale)),
        "negative-prompt": request.negative_prompt,
    }
    if request.negative_scale is not None:
        chunks["negative-scale"] = str(float(request.negative_scale))
    if request.clip_prompt is not None:
        chunks["clip-prompt"] = request.clip_prompt
    if request.sizes is not None:
        sizes = dataclasses.asdict(request.sizes)
        chunks |= {name.replace("_", "-"): str(value) for name, value in sizes.items()}
    return {**chunks, "width": str(request.width), "height": str(request.height), **(extra or {})}


def save_picture(image: Image, path: Path, chunks: Mapping[str, str]) -> None:
    """Write a PNG file with text chunks; it appears whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)
