"""Which kinds of data sets each script takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from library.data.config_schema import Support

_FOLDERS = Support(dreambooth=True, finetuning=False)
_METADATA = Support(dreambooth=False, finetuning=True)
_BOTH = Support(dreambooth=True, finetuning=True)
_WHOLE_CAPTIONS = Support(dreambooth=True, finetuning=True, dropout=False)
_PAIRS = Support(dreambooth=False, controlnet=True)
# Caches are the same with and without masks or conditioning pictures.
_ANY = Support(dreambooth=True, finetuning=True, masks=True)

SUPPORT: Mapping[str, Support] = {
    "train_db.py": _FOLDERS,
    "fine_tune.py": _METADATA,
    "train_network.py": _BOTH,
    "sdxl_train.py": _BOTH,
    "sdxl_train_network.py": _BOTH,
    "train_textual_inversion.py": _WHOLE_CAPTIONS,
    "train_textual_inversion_XTI.py": _WHOLE_CAPTIONS,
    "sdxl_train_textual_inversion.py": _WHOLE_CAPTIONS,
    "train_controlnet.py": _PAIRS,
    "sdxl_train_control_net_lllite.py": _PAIRS,
    "sdxl_train_control_net_lllite_old.py": _PAIRS,
    "tools/cache_latents.py": _ANY,
    "tools/cache_text_encoder_outputs.py": _ANY,
}


def with_masks(support: Support, masked_loss: bool) -> Support:
    """The same, with loss masks from folders where the loss is masked; pairs of a ControlNet are no masks."""
    return replace(support, masks=support.masks or (masked_loss and (support.dreambooth or support.finetuning)))
