"""Old functions of the text output cache, and of data sets that cache it themselves; nothing inside uses these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.data.text_file import CachedText, read_text, write_text
from library.messages import UserError
from library.models.family import family

if TYPE_CHECKING:
    from library.data.classic import ImageInfo


def save_text_encoder_outputs_to_disk(
    npz_path: str, hidden_state1: torch.Tensor, hidden_state2: torch.Tensor | None, pool2: torch.Tensor | None
) -> None:
    """Write the outputs of one caption; the file has no key, as nobody says here which caption it is."""
    write_text(npz_path, CachedText(hidden_state1, hidden_state2, pool2))


def load_text_encoder_outputs_from_disk(
    npz_path: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Hidden states of both text encoders and pooled text of one caption."""
    return read_text(npz_path).tensors()


@torch.no_grad()
def cache_batch_text_encoder_outputs(
    image_infos: Sequence[ImageInfo],
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    max_token_length: int | None,
    cache_to_disk: bool,
    input_ids1: torch.Tensor,
    input_ids2: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Encode captions; write each picture's `text_encoder_outputs_npz`, or fill its fields on the CPU.

    Args:
        input_ids1, input_ids2: (B, n, 77) or (B, 77) of the captions.

    Raises:
        UserError: outputs are not finite.
    """
    text = family("sdxl").encode_text(
        list(text_encoders),
        [ids.to(next(e.parameters()).device) for ids, e in zip((input_ids1, input_ids2), text_encoders, strict=True)],
        tokenizers=list(tokenizers),
        max_token_length=max_token_length,
        dtype=dtype,
    )
    assert text.pooled is not None
    outputs = [tensor.to(dtype).cpu() for tensor in (*text.hidden, text.pooled)]
    for info, hidden1, hidden2, pooled in zip(image_infos, *outputs, strict=True):
        if not all(tensor.isfinite().all() for tensor in (hidden1, hidden2, pooled)):
            raise UserError(
                f"the text encoders give values that are not finite for {info.absolute_path}", "use them in float32"
            )
        if cache_to_disk:
            assert info.text_encoder_outputs_npz is not None
            save_text_encoder_outputs_to_disk(info.text_encoder_outputs_npz, hidden1, hidden2, pooled)
        else:
            info.text_encoder_outputs1, info.text_encoder_outputs2 = hidden1, hidden2
            info.text_encoder_pool2 = pooled
