"""The recipe of the textual inversion scripts: asks the trainer object, whose hooks third parties override."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from library.data.support import SUPPORT
from library.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, names_word, write_out
from library.messages import UserError, log
from library.models.embedding_files import require_width
from library.models.embeddings import grow_table, init_word_ids, random_rows, rows_of, set_rows
from library.models.text_encoders import enable_gradient_checkpointing
from library.runtime.float8 import hold_in_float8
from library.runtime.streams import stream
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training import model_setup
from library.training.hooks import Hooks, refuse_strategy_overrides
from library.training.metadata import modelspec_for_run
from library.training.metrics import model_step_logs
from library.training.network_setup import require_file
from library.training.new_word import NewWord, add_word
from library.training.optimizers import optimizer_name
from library.training.recipes.recipe import Recipe, Setup
from library.training.saving import network_extension
from library.training.targets.embedding import NUMBER_BY_NUMBER, EmbeddingTarget

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.feed import DataFeed
    from library.training.optimizers import Built
    from library.training.saver import Metadata
    from library.training.textual_inversion_trainer import TextualInversionTrainer


class EmbeddingHooks(Hooks):
    """Hooks of the embedding trainers: only `sample_images` can be overridden among those that the loop knows."""

    def overridden(self, name: str) -> bool:
        return name == "sample_images" and super().overridden(name)

    def sample_images(self, *arguments: Any) -> None:
        super().sample_images(*arguments, self.trainer.word.prompt_replacement)


class EmbeddingRecipe(Recipe):
    """A new word for a frozen model.

    Args:
        trainer: whose hooks are asked.
    """

    tracker = "textual_inversion"
    says_token_ids = True
    step_logs = staticmethod(model_step_logs)
    hooks: EmbeddingHooks

    def __init__(self, trainer: TextualInversionTrainer) -> None:
        refuse_strategy_overrides(trainer)
        super().__init__(trainer)
        self.trainer = trainer
        self.hooks = EmbeddingHooks(trainer)
        self.script = trainer.script
        self.support = SUPPORT[trainer.script]

    @property
    def word(self) -> NewWord:
        """The word; there from `load_tokenizers` on."""
        assert self.trainer.word is not None
        return self.trainer.word

    # Data

    def load_tokenizers(self, args: Any) -> list[Any]:
        """The tokenizers with the word's tokens; files are named after the word unless they have a name."""
        if args.output_name is None:
            args.output_name = args.token_string
        tokenizers = super().load_tokenizers(args)
        self.trainer.assert_token_string(args.token_string, tokenizers)
        self.trainer.word = add_word(
            tokenizers, args.token_string, args.num_vectors_per_token, layered=self.trainer.layered
        )
        return tokenizers

    def prepare_captions(self, args: Any, group: Any) -> None:
        """Templates, or the word written out as all its tokens."""
        templates = None
        if args.use_object_template or args.use_style_template:
            templates = OBJECT_TEMPLATES if args.use_object_template else STYLE_TEMPLATES
        elif not names_word(group, args.token_string):
            log.warning(
                "no caption holds the word %s: it cannot be learned; name it in the captions or use a template option",
                args.token_string,
            )
        write_out(group, args.token_string, self.word.tokens, templates)

    def check_group(self, args: Any, group: Any) -> None:
        self.hooks.assert_extra_args(args, group)

    def check(self, options: Resolved) -> None:
        if options.embedding.weights:
            require_file(options.embedding.weights, "--weights")

    # Model

    def after_opening(self, setup: Setup) -> None:
        """The word's rows: from other words, by chance, or of an embedding file."""
        options = setup.options.embedding
        for index, (encoder, tokenizer) in enumerate(zip(setup.model.text_encoders, setup.tokenizers, strict=True)):
            known = self.word.ids[0]
            grow_table(encoder, len(tokenizer))
            if options.init_word is not None:
                ids = init_word_ids(tokenizer, options.init_word, len(self.word.ids))
                rows = rows_of(encoder, [ids[k % len(ids)] for k in range(len(self.word.ids))])
            else:
                generator = stream(setup.args.seed, "embedding", item=index)
                rows = random_rows(encoder, len(self.word.ids), known, generator)
            for ids in (self.word.ids, *self.word.layer_ids):
                set_rows(encoder, ids, rows)
        if options.weights:
            self._load_weights(setup, options.weights)

    def _load_weights(self, setup: Setup, path: str) -> None:
        ids, count = self.word.trained_ids, len(self.word.ids)
        tables = self.hooks.call("load_weights", path)
        for index, (encoder, table) in enumerate(zip(setup.model.text_encoders, tables, strict=True)):
            if table is None:
                log.warning("%s has no vectors for text encoder %d: they start as without it", path, index + 1)
                continue
            if len(table) != len(ids):
                per_layer = len(table) * count // len(ids)
                raise UserError(
                    f"--weights {path} has {per_layer} vectors, --num_vectors_per_token is {count}",
                    f"give --num_vectors_per_token {per_layer}",
                )
            require_width(table, rows_of(encoder, ids[:1]).shape[1], path)
            set_rows(encoder, ids, table)
        log.info("starting from %s", path)

    def scale_latents(self, args: Any, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.trainer.vae_scale_factor

    def prepare_text(self, setup: Setup) -> None:
        """The encoders learn in float32, under autocast, unless `--full_*` halves them."""
        dtype = setup.dtype if setup.options.precision.halves_trained else torch.float32
        for encoder in setup.model.text_encoders:
            encoder.to(setup.processes.device, dtype)

    # What is trained

    def make_target(self, setup: Setup) -> EmbeddingTarget:
        model, device = setup.model, setup.processes.device
        wrap_model(model.unet, WrapPolicy(device=device, dtype=setup.dtype), family=self.family.name)
        if setup.options.precision.fp8_base:
            hold_in_float8(model.unet)
        model_setup.checkpoint_and_compile(self.family, setup)
        if setup.options.precision.gradient_checkpointing:
            for encoder in model.text_encoders:
                enable_gradient_checkpointing(encoder)
                encoder.train()
        mixed = setup.dtype != torch.float32
        return EmbeddingTarget(
            hooks=self.hooks,
            args=setup.args,
            accelerator=setup.processes.accelerator,
            family=self.family,
            model=model,
            word=self.word,
            weight_dtype=setup.dtype,
            autocast=setup.processes.autocast if mixed else contextlib.nullcontext,
            halved=setup.options.precision.halves_trained,
            rows_alone=takes_rows_alone(setup.options),
        )

    # What is written

    def metadata(self, setup: Setup, feed: DataFeed, built: Built, epochs: int) -> Metadata:
        sdxl = self.family.name == "sdxl"
        return lambda run, epoch: modelspec_for_run(
            setup.options, setup.group.datasets, kind="textual_inversion", sdxl=sdxl
        )

    def extension(self, setup: Setup) -> str:
        return network_extension(setup.options.saving)


def takes_rows_alone(options: Resolved) -> bool:
    """Whether the optimizer can get the new rows instead of whole tables.

    A gradient scaler looks at the optimizer's own gradients only, so under fp16 it must know the whole tables.
    """
    number_by_number = optimizer_name(options.optimizer).lower() in NUMBER_BY_NUMBER
    in_steps = not options.optimizer.fused_backward_pass
    return number_by_number and in_steps and options.precision.mixed_precision != "fp16"
