"""Edges of a picture, as ControlNets for edges are trained with."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from library.data.images import encoded, read_upright
from library.messages import UserError, log
from library.options.data_tools import EdgesConfig
from library.runtime.files import atomic_write, no_file


def edges(image: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges.

    Args:
        image: uint8 (H, W, 3), RGB.
        low, high: thresholds of the gradient; their order does not matter.

    Returns:
        uint8 (H, W), 0 or 255.
    """
    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high)


def draw_edges(config: EdgesConfig) -> None:
    """Write the edges of one picture file as another.

    Raises:
        UserError: a name that is missing, a picture that cannot be read, an ending that OpenCV cannot write.
    """
    assert config.input and config.output, "checked with the options"
    suffix = Path(config.output).suffix
    if not suffix or not cv2.haveImageWriter(f"x{suffix}"):
        raise UserError(f"--output {config.output}: no picture format", "let the name end in .png, .jpg, .webp or .bmp")
    if not os.path.isfile(config.input):
        raise UserError(f"--input {config.input} {no_file(config.input)}", "check the path")
    data = encoded(edges(read_upright(config.input), config.thres1, config.thres2), suffix)
    with atomic_write(config.output) as file:
        file.write(data)
    log.info("written: %s", config.output)
