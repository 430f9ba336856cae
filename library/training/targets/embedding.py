"""Target: the vectors of a new word in the token tables of the text encoders.

Gradients are clipped by the norm of whole tables, the other words of the captions included. An optimizer that treats
every number by itself works on the new rows alone, which gives the same numbers and spares the memory of whole tables;
any other (Adafactor, those that find their rate, 8-bit ones) works on whole tables, and after every micro-step all
other rows are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError, log
from library.models.embeddings import token_table
from library.runtime.files import atomic_path
from library.training.targets.target import Target, non_finite

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.models.family import Family, LoadedModel
    from library.runtime.processes import Processes
    from library.training.hooks import Hooks
    from library.training.new_word import NewWord

TABLE_KEY = "embeddings.token_embedding.weight"
# Names of optimizers whose update of a number depends on that number, its gradient and its own state alone.
NUMBER_BY_NUMBER = frozenset({"adamw", "adam", "nadam", "radam", "adamax", "rmsprop", "sgd", "sgdnesterov", "lion"})


class EmbeddingTarget(Target):
    """The rows of a new word, driven through a trainer object's hooks.

    Args:
        hooks: of the trainer object.
        args: the caller's namespace, which hooks read live.
        accelerator: as hooks expect it.
        family, model: frozen, on the training device, with the word's rows in its token tables.
        word: its tokens.
        weight_dtype: of the U-Net.
        autocast: a context manager factory for the text encoders.
        halved: the tables themselves are in half precision (`--full_fp16`, `--full_bf16`).
        rows_alone: the optimizer gets the new rows instead of whole tables.
    """

    trains_text = True

    def __init__(
        self,
        *,
        hooks: Hooks,
        args: Any,
        accelerator: Any,
        family: Family,
        model: LoadedModel,
        word: NewWord,
        weight_dtype: torch.dtype,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        halved: bool = False,
        rows_alone: bool = False,
    ) -> None:
        self.hooks = hooks
        self.args = args
        self.accelerator = accelerator
        self.family = family
        self.model = model
        self.words = word.words
        self.weight_dtype = weight_dtype
        self.autocast = autocast
        self.halved = halved
        self.first_row = word.trained_ids[0]
        self.tables = [token_table(encoder).weight for encoder in model.text_encoders]
        for table in self.tables:
            table.requires_grad_(True)
        # They share their memory with the tables, as their gradients will.
        self.own_rows = [torch.nn.Parameter(rows) for rows in self.rows()] if rows_alone else []
        self.kept = [] if rows_alone else [table.detach()[: self.first_row].clone() for table in self.tables]
        self._updated = False

    def rows(self) -> list[torch.Tensor]:
        """The trained rows (n, D) of each table, as they are now (not copied)."""
        return [table.detach()[self.first_row :] for table in self.tables]

    def parameter_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        return [{"params": self.own_rows or self.tables}], ["embedding"]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return self.tables

    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        return self.own_rows or self.tables

    def reduce_gradients(self, processes: Processes) -> None:
        super().reduce_gradients(processes)
        for rows, table in zip(self.own_rows, self.tables, strict=False):
            rows.grad = None if table.grad is None else table.grad[self.first_row :]
        self._updated = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"rows{number}": rows for number, rows in enumerate(self.rows(), 1)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for number, rows in enumerate(self.rows(), 1):
            stored = state[f"rows{number}"]
            if stored.shape != rows.shape:
                raise ValueError(f"{tuple(stored.shape)} numbers instead of {tuple(rows.shape)}")
            rows.copy_(stored)

    def load_prepared(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Whole text encoders, in the order of the model's."""
        for state, table, rows in zip(states, self.tables, self.rows(), strict=True):
            stored = next(value for key, value in state.items() if key.endswith(TABLE_KEY))
            if stored.shape != table.shape:
                raise ValueError(f"a token table of {tuple(stored.shape)} instead of {tuple(table.shape)}")
            rows.copy_(stored[self.first_row :])
        log.info("the word's vectors taken from the state")

    def prepared_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """sd-scripts keeps it for whole tables."""
        if not self.own_rows:
            return state

        def own_part(value: Any) -> Any:
            whole = torch.is_tensor(value) and value.ndim == 2
            return value[self.first_row :].clone() if whole else value

        numbers = {number: {k: own_part(v) for k, v in one.items()} for number, one in state["state"].items()}
        return {**state, "state": numbers}

    def encode_text(self, batch: Batch) -> Any:
        with self.autocast():
            text = self.hooks.call(
                "get_text_cond",
                self.args,
                self.accelerator,
                batch,
                self.model.tokenizers,
                self.model.text_encoders,
                self.weight_dtype,
            )
        return text if self.halved else as_float(text)

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: Batch) -> torch.Tensor:
        return self.hooks.call(
            "call_unet",
            self.args,
            self.accelerator,
            self.model.unet,
            noisy_latents,
            timesteps,
            text,
            batch,
            self.weight_dtype,
        )

    @torch.no_grad()
    def on_step_end(self) -> dict[str, Any]:
        """After an update: put all rows back that are not trained, drop gradients that the optimizer does not know."""
        if self._updated:
            self._updated = False
            for table, kept in zip(self.tables, self.kept, strict=False):
                table[: self.first_row] = kept
            for table in self.tables:
                table.grad = None
        return {}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        """Write the embedding file; refused when a value is not finite."""
        bad = non_finite(self.state_dict())
        if bad:
            raise UserError(
                f"{path.name} is not written: its vectors are not finite numbers",
                "lower the learning rate or use --mixed_precision bf16; earlier files are intact",
            )
        rows = [rows.clone() for rows in self.rows()]
        with atomic_path(path) as partial:  # overridden methods neither make the folder nor write atomically
            self.hooks.call("save_weights", str(partial), rows, dtype, metadata)


def as_float(text: Any) -> Any:
    """Text states in any of a hook's forms as float32."""
    return text.float() if torch.is_tensor(text) else type(text)(states.float() for states in text)
