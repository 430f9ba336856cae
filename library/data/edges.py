"""Edges of a picture, as ControlNets for edges are trained with."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from library.data.images import read_image
from library.data.orientation import orientation_of
from library.messages import UserError, log
from library.options.data_tools import EdgesConfig
from library.runtime.files import atomic_write


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
    try:
        orientation = orientation_of(config.input)
    except OSError as error:
        raise UserError(f"cannot read --input {config.input} ({error.strerror})", "check the path") from None
    image = edges(read_image(config.input, orientation=orientation), config.thres1, config.thres2)
    data = encoded(image, suffix)
    with atomic_write(config.output) as file:
        file.write(data)
    log.info("written: %s", config.output)


def encoded(image: np.ndarray, suffix: str) -> bytes:
    """A picture file's bytes, in OpenCV's order of channels (BGR) or grey; encoded in memory, for any file name."""
    done, data = cv2.imencode(suffix, image)
    if not done:
        raise UserError(f"OpenCV cannot write {suffix} files", "choose .png")
    return data.tobytes()
