"""Pictures in windows, for the interactive mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.messages import warn_once

if TYPE_CHECKING:
    from PIL.Image import Image

TITLE_LENGTH = 128


def show(image: Image, prompt: str) -> None:
    """Show a picture with OpenCV until a key is pressed; a message where OpenCV has no windows."""
    try:
        import cv2
        import numpy as np

        cv2.imshow(prompt[:TITLE_LENGTH], np.asarray(image.convert("RGB"))[:, :, ::-1])
        cv2.waitKey()
        cv2.destroyAllWindows()
    except ImportError:
        warn_once("no preview: the package opencv-python is not installed (--no_preview hides this message)")
    except cv2.error:
        warn_once("no preview: OpenCV cannot open windows here (--no_preview hides this message)")
