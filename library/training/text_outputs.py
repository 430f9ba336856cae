"""Captions encoded with a family's text encoders, as the text cache asks for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.data.latents_file import fingerprint
from library.data.text_cache import BATCH_SIZE, cache_text_outputs
from library.data.text_file import CachedText, TextOrigin
from library.models.tokenizers import input_ids

if TYPE_CHECKING:
    from library.models.family import Family


@dataclass(frozen=True, slots=True)
class TextCacher:
    """What a data-set group calls to have its captions encoded (`DatasetGroup.cache_text`).

    Attributes:
        family: whose rules of encoding hold.
        max_token_length: 150 or 225 for two or three chunks, else None.
        skip_check: an existing file is taken without a look inside.
        batch_size: captions per call of the encoders.
    """

    family: Family
    max_token_length: int | None = None
    skip_check: bool = False
    batch_size: int = BATCH_SIZE

    def __call__(
        self,
        datasets: Sequence[Any],
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        device: Any,
        dtype: torch.dtype,
        to_disk: bool,
    ) -> None:
        """Encode with encoders that are on the device; with torch.distributed the files are shared out."""
        rank, processes, wait = 0, 1, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
            wait = torch.distributed.barrier
        cache_text_outputs(
            datasets,
            CaptionEncoder(self.family, list(tokenizers), list(text_encoders), self.max_token_length, device, dtype),
            origin_of(tokenizers, text_encoders, self.max_token_length, dtype),
            to_disk=to_disk,
            skip_check=self.skip_check,
            batch_size=self.batch_size,
            rank=rank,
            processes=processes,
            wait=wait,
        )


@dataclass(frozen=True, slots=True)
class CaptionEncoder:
    """Captions -> hidden states and pooled text, one row a caption, of this dtype."""

    family: Family
    tokenizers: list[Any]
    text_encoders: list[Any]
    max_token_length: int | None
    device: Any
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> CachedText:
        ids = [input_ids(tokenizer, captions, self.max_token_length) for tokenizer in self.tokenizers]
        text = self.family.encode_text(
            self.text_encoders,
            [rows.to(self.device) for rows in ids],
            tokenizers=self.tokenizers,
            max_token_length=self.max_token_length,
            dtype=self.dtype,
        )
        pooled = None if text.pooled is None else text.pooled.to(self.dtype)
        return CachedText(text.hidden[0], text.hidden[1] if len(text.hidden) > 1 else None, pooled)


def origin_of(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], max_token_length: int | None, dtype: torch.dtype
) -> TextOrigin:
    """What tells cached outputs of these encoders from those of others."""
    digest = hashlib.blake2b(digest_size=16)
    for tokenizer in tokenizers:
        digest.update(repr((len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)).encode())
    for encoder in text_encoders:
        digest.update(fingerprint(encoder).encode())
    widths: tuple[int, ...] = ()
    configs = [getattr(encoder, "config", None) for encoder in text_encoders]
    if len(configs) == 2 and None not in configs:
        widths = (configs[0].hidden_size, configs[1].hidden_size, configs[1].projection_dim)
    return TextOrigin((max_token_length or 75) + 2, widths, digest.hexdigest(), str(dtype).removeprefix("torch."))
