"""Old import path of XTI's forward functions; the U-Net of this program takes text states per layer by itself."""

from __future__ import annotations

from library.porch import porch

NAMES: dict[str, str] = {
    "unet_forward_XTI": "library.models.porch_xti:unet_forward_XTI",
    "downblock_forward_XTI": "library.models.porch_xti:downblock_forward_XTI",
    "upblock_forward_XTI": "library.models.porch_xti:upblock_forward_XTI",
}
__getattr__, __dir__ = porch(__name__, NAMES)
