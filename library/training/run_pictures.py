"""Sample pictures over time, on the page about a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.page import Page
    from library.training.run_history import History

# Pictures are shown this large at most, and so many of each prompt: the first, the last, and evenly chosen ones.
SIDE = 256
MOST_PROMPTS = 8
MOST_TIMES = 10


def add_pictures(page: Page, history: History, folder: Path) -> None:
    """A section with the sample pictures that are still there.

    Args:
        folder: the run's output folder.
    """
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for line in history.samples:
        if (folder / line["path"]).is_file():
            by_prompt.setdefault(line["index"], []).append(line)
    if not by_prompt:
        return
    page.section("Sample pictures")
    for index in sorted(by_prompt)[:MOST_PROMPTS]:
        lines = by_prompt[index]
        page.subsection(lines[-1]["prompt"])
        for average, title in ((False, ""), (True, "With the moving average of the weights:")):
            chosen = evenly([line for line in lines if line["ema"] == average], MOST_TIMES)
            if chosen and title:
                page.text(title)
            if chosen:
                page.picture_grid([(_thumbnail(folder / one["path"]), _caption(one)) for one in chosen])
    if len(by_prompt) > MOST_PROMPTS:
        page.text(f"Pictures of {len(by_prompt) - MOST_PROMPTS} more prompts are in the folder `sample`.")


def _caption(line: dict[str, Any]) -> str:
    return f"step {line['step']:,}, seed {line['seed']}"


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items: the first, the last, and evenly spaced ones between them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _thumbnail(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    return picture
