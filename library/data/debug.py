"""`--debug_dataset`: says what the batches of one epoch hold, and shows their pictures: in windows or in files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cv2
import torch

from library.data.sheets import Sheets, pixels_of
from library.messages import log

ESCAPE = 27
FOLDER = "debug_dataset"


def debug_dataset(train_dataset: Any, show_input_ids: bool = False, folder: str | os.PathLike[str] = FOLDER) -> None:
    """Make every batch of epoch 1, say what it holds, and return.

    Where windows can be shown, each batch waits for a key: `s` next batch, `e` or Escape end. Elsewhere a contact
    sheet of each bucket is written.

    Args:
        train_dataset: a data-set group, or a data set whose items are batches.
        show_input_ids: say token ids too.
        folder: where the contact sheets go.
    """
    sheets = None if _has_screen() else Sheets()
    log.info("data set of %d batches", len(train_dataset))
    train_dataset.set_current_epoch(1)
    for position in range(len(train_dataset)):
        train_dataset.set_current_step(position)
        batch = train_dataset[position]
        log.info("batch %d: %s", position, _shapes(batch))
        for line in _pictures(batch, show_input_ids):
            log.info("  %s", line)
        if sheets is not None:
            sheets.add(batch)
        elif batch.get("images") is not None and not _show(batch):
            return
    if sheets is not None:
        written = sheets.write(Path(folder))
        log.info("contact sheets: %d in %s", len(written), Path(folder).resolve())


def _shapes(batch: dict[str, Any]) -> str:
    shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _pictures(batch: dict[str, Any], show_input_ids: bool) -> list[str]:
    """One line a picture; keys that a foreign data set leaves out are left out here."""
    lines = []
    labels = {
        "loss_weights": "loss weight",
        "original_sizes_hw": "original size",
        "crop_top_lefts": "crop",
        "target_sizes_hw": "target size",
        "flippeds": "flipped",
    }
    for i, caption in enumerate(batch["captions"]):
        keys = batch.get("image_keys")
        parts = [str(keys[i])] if keys else []
        parts.append(f'caption "{caption}"')
        for name, label in labels.items():
            values = batch.get(name)
            if values is not None and hasattr(values, "__len__"):
                value = values[i]
                parts.append(f"{label} {value.tolist() if torch.is_tensor(value) else value}")
        if show_input_ids:
            for name in ("input_ids", "input_ids2"):
                if batch.get(name) is not None:
                    parts.append(f"{name} {batch[name][i].tolist()}")
        lines.append(", ".join(parts))
    return lines


def _has_screen() -> bool:
    """OpenCV windows work on Windows alone without further set-up, as in the original."""
    return os.name == "nt" and sys.stdout.isatty()


def _show(batch: dict[str, Any]) -> bool:
    for picture in batch["images"]:
        try:
            cv2.imshow("picture", pixels_of(picture)[..., ::-1])
            key = cv2.waitKey()
            cv2.destroyAllWindows()
        except cv2.error:  # the headless build has no windows
            return True
        if key in (ord("e"), ESCAPE):
            return False
        if key == ord("s"):
            break
    return True
