"""Captions to token ids, in the form data sets call it; can be sent to loader workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.models.tokenizers import input_ids


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """Tokenizes one caption with one or two tokenizers.

    Attributes:
        tokenizers: of the model's text encoders.
        max_token_length: 150 or 225 for two or three chunks, else None.
    """

    tokenizers: Sequence[Any]
    max_token_length: int | None = None

    def __call__(self, caption: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """int64 (n, 77) of the first tokenizer, and of the second or None."""
        ids = [input_ids(tokenizer, [caption], self.max_token_length)[0] for tokenizer in self.tokenizers]
        return ids[0], ids[1] if len(ids) > 1 else None
