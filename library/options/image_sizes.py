"""The sizes that an SDXL picture is asked for with: its model knows the sizes of the pictures it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSizesConfig:
    """What SDXL is told of a picture's size besides the size itself."""

    original_height: int | None = option(None, "height of the source picture; the picture's own when left out")
    original_width: int | None = option(None, "width of the source picture; the picture's own when left out")
    original_height_negative: int | None = option(
        None, "height of the source picture for the negative prompt; --original_height when left out"
    )
    original_width_negative: int | None = option(
        None, "width of the source picture for the negative prompt; --original_width when left out"
    )
    crop_top: int | None = option(None, "rows of the source picture that are cut off at the top; 0 when left out")
    crop_left: int | None = option(None, "columns of the source picture that are cut off at the left; 0 when left out")
