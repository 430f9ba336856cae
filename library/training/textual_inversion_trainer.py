"""Trainers of textual inversion, whose methods third parties override: SD 1.x/2.x, SDXL, and XTI on SD 1.x/2.x.

Hook names, argument order and results are those of sd-scripts 0.7.0. A base method does the whole job of its hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.models.embedding_files import (
    PLAIN,
    PLAIN_KEY,
    SDXL,
    SDXL_KEYS,
    XTI,
    XTI_LAYERS,
    read_embedding,
    tables_of,
    write_embedding,
)
from library.options.sdxl import BUCKET_STEPS, verify_sdxl_training_args
from library.training.hooked_trainer import HookedSdxlTrainer, HookedTrainer

if TYPE_CHECKING:
    import argparse

    from library.training.new_word import NewWord


class TextualInversionTrainer(HookedTrainer):
    """Teaches the text encoder of an SD 1.x/2.x model a new word.

    Attributes: see `HookedTrainer`; word: its tokens, once they are in the tokenizers; layered: the word has its own
    vectors for each cross-attention of the U-Net.
    """

    script = "train_textual_inversion.py"
    layered = False

    def __init__(self) -> None:
        super().__init__()
        self.word: NewWord | None = None

    def train(self, args: argparse.Namespace) -> None:
        """The whole run; returns early for `--debug_dataset` and `--dry_run`."""
        from library.training.recipes.embedding import EmbeddingRecipe
        from library.training.recipes.recipe import train_by

        train_by(EmbeddingRecipe(self), args)

    # Before the first step

    def assert_token_string(self, token_string: str, tokenizers: Any) -> None:
        """May refuse a word; nothing to check beyond what adding its tokens checks."""

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any = None) -> None:
        """May raise, may change args, may configure the data set. Nothing to check here."""

    def load_weights(self, file: str) -> list[torch.Tensor | None]:
        """The vectors (n, D) of `--weights`, a table for each text encoder; None where the file has none for it."""
        return tables_of(read_embedding(file), PLAIN)

    # Each micro-step

    def get_text_cond(
        self,
        args: Any,
        accelerator: Any,
        batch: Any,
        tokenizers: Any,
        text_encoders: Any,
        weight_dtype: torch.dtype,
    ) -> Any:
        """Encoded text of a batch, with gradients: hidden states, or (hidden 1, hidden 2, pooled) of SDXL."""
        encoders = _as_list(text_encoders)
        keys = ("input_ids", "input_ids2")[: len(encoders)]
        text = self.family.encode_text(
            encoders,
            [batch[key].to(accelerator.device, non_blocking=True) for key in keys],
            tokenizers=_as_list(tokenizers),
            clip_skip=args.clip_skip,
            max_token_length=args.max_token_length,
            dtype=weight_dtype if args.full_fp16 or args.full_bf16 else None,
        )
        return text.hidden[0] if text.pooled is None else (*text.hidden, text.pooled)

    # When pictures are drawn and files written

    def sample_images(
        self,
        accelerator: Any,
        args: Any,
        epoch: int | None,
        global_step: int,
        device: Any,
        vae: Any,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        prompt_replacement: tuple[str, str] | None,
    ) -> None:
        """Draw the sample pictures if this step or epoch is one for them; prompts may name the word."""
        assert self.run is not None
        self.run.samples.draw_if_due(self.run, epoch, global_step)

    def save_weights(
        self, file: str, updated_embs: Sequence[torch.Tensor], save_dtype: torch.dtype | None, metadata: Any
    ) -> None:
        """Write the vectors (n, D), one table for each text encoder."""
        write_embedding(file, {PLAIN_KEY: updated_embs[0]}, save_dtype, metadata)


class SdxlTextualInversionTrainer(HookedSdxlTrainer, TextualInversionTrainer):
    """Teaches both text encoders of an SDXL model a new word."""

    script = "sdxl_train_textual_inversion.py"

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any = None) -> None:
        """Options that SDXL cannot have, buckets that its U-Net cannot take."""
        super().assert_extra_args(args, train_dataset_group, val_dataset_group)
        verify_sdxl_training_args(args, support_text_encoder_caching=False)
        train_dataset_group.verify_bucket_reso_steps(BUCKET_STEPS)

    def load_weights(self, file: str) -> list[torch.Tensor | None]:
        return tables_of(read_embedding(file), SDXL)

    def save_weights(
        self, file: str, updated_embs: Sequence[torch.Tensor], save_dtype: torch.dtype | None, metadata: Any
    ) -> None:
        write_embedding(file, dict(zip(SDXL_KEYS, updated_embs, strict=True)), save_dtype, metadata)


class LayeredInversionTrainer(TextualInversionTrainer):
    """Teaches a word with its own vectors for each cross-attention of the U-Net (XTI)."""

    script = "train_textual_inversion_XTI.py"
    layered = True

    def load_weights(self, file: str) -> list[torch.Tensor | None]:
        """One table (16 n, D), layer by layer."""
        return [load_layers(file)]

    def get_text_cond(
        self,
        args: Any,
        accelerator: Any,
        batch: Any,
        tokenizers: Any,
        text_encoders: Any,
        weight_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Hidden states (16, B, L, D): the text of each layer, all layers encoded in one call."""
        assert self.word is not None
        ids = self.word.for_layers(batch["input_ids"])
        flat = {**batch, "input_ids": ids.flatten(0, 1)}
        states = super().get_text_cond(args, accelerator, flat, tokenizers, text_encoders, weight_dtype)
        return states.unflatten(0, ids.shape[:2])

    def save_weights(
        self, file: str, updated_embs: Sequence[torch.Tensor], save_dtype: torch.dtype | None, metadata: Any
    ) -> None:
        save_layers(file, updated_embs[0], save_dtype, metadata)


def save_layers(file: str, updated_embs: torch.Tensor, save_dtype: torch.dtype | None, metadata: Any = None) -> None:
    """Write an XTI file from the vectors (16 n, D), layer by layer."""
    tables = updated_embs.reshape(len(XTI_LAYERS), -1, updated_embs.shape[-1])
    write_embedding(file, dict(zip(XTI_LAYERS, tables, strict=True)), save_dtype, metadata)


def load_layers(file: str) -> torch.Tensor:
    """The vectors (16 n, D) of an XTI file, layer by layer."""
    return torch.cat([table for table in tables_of(read_embedding(file), XTI) if table is not None])


def train_layered(args: argparse.Namespace) -> None:
    """The function `train` of `train_textual_inversion_XTI.py`."""
    LayeredInversionTrainer().train(args)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
