"""Old import path of attention as a diffusers processor."""

from library.porch import porch

NAMES = {
    "FlashAttentionFunction": "library.models.old_attention:FlashAttentionFunction",
    "FlashAttnProcessor": "library.models.old_attention:FlashAttnProcessor",
}
__getattr__, __dir__ = porch(__name__, NAMES)
