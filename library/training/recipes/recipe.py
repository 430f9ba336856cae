"""Recipe: what makes one training script differ from the others. `assemble.build_run` asks it, and nothing else does.

A new script is a recipe, an entry in `options/scripts.py` and a thin file at the top level. The calls come in the
order of the methods below; each has a default where the scripts agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.models.family import Family, LoadedModel
from library.training import model_setup
from library.training.metrics import step_logs

if TYPE_CHECKING:
    import argparse

    from library.data.config_schema import Support
    from library.options.parser import Resolved
    from library.runtime.parallel import Copies
    from library.runtime.processes import Processes
    from library.training.draws import Draws
    from library.training.feed import DataFeed
    from library.training.hooked_trainer import HookedTrainer
    from library.training.hooks import Hooks
    from library.training.optimizers import Built
    from library.training.saver import Metadata
    from library.training.targets.target import Target


@dataclass(kw_only=True)
class Setup:
    """What assembly has so far.

    Attributes:
        args: the caller's namespace; only hooks of third parties read it, and what hooks may change is read from it.
        options: the options; the effective ones from `metadata` on.
        tokenizers: one per text encoder.
        group: the data set group.
        processes, draws: of the run.
        has_trackers: values go to tensorboard, wandb or others.
        parallel: how weights, gradients and optimizer state lie on the processes.
        dtype: of frozen weights and of the computations (`--mixed_precision`).
    """

    args: argparse.Namespace
    options: Resolved
    tokenizers: list[Any]
    group: Any
    processes: Processes
    has_trackers: bool
    parallel: Copies
    draws: Draws
    dtype: torch.dtype
    opened: LoadedModel | None = None

    @property
    def model(self) -> LoadedModel:
        """The opened model; there from `open_model` on."""
        assert self.opened is not None
        return self.opened

    @property
    def shapes(self) -> int:
        """How many shapes of batches the data sets give (buckets), at least 1."""
        return max(1, sum(len(one.buckets.sizes) for one in self.group.datasets if hasattr(one, "buckets")))


class Recipe(ABC):
    """One training script.

    Args:
        opener: opens tokenizers and model; a trainer object of third parties, or the plain class.

    Attributes:
        script: whose options the namespace has.
        tracker: name of the trackers' run when `--log_tracker_name` is left out.
        support: which kinds of data sets it takes.
        step_logs: makes the trackers' values of a micro-step.
        says_token_ids: `--debug_dataset` says them too.
        hooks: of a trainer object of third parties, where there is one.
        spreads: ways of spreading the weights over processes that work, `FSDP` and `--deepspeed`.
    """

    script: str
    tracker: str
    support: Support
    step_logs = staticmethod(step_logs)
    says_token_ids = False
    hooks: Hooks | None = None
    spreads: tuple[str, ...] = ()

    def __init__(self, opener: HookedTrainer) -> None:
        self.opener = opener

    @property
    def family(self) -> Family:
        return self.opener.family

    # Data

    def load_tokenizers(self, args: Any) -> list[Any]:
        """One tokenizer per text encoder."""
        tokenizers = self.opener.load_tokenizer(args)
        return list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]

    def prepare_captions(self, args: Any, group: Any) -> None:
        """What becomes of all captions of the data sets, before anything is shown or cached."""

    def check_group(self, args: Any, group: Any) -> None:
        """Checks that need the data sets, and settings that go into them; may change `args`."""

    def check(self, options: Resolved) -> None:
        """Files and packages that are needed later, looked at before minutes are spent on the model and caches."""

    # Model

    def open_model(self, setup: Setup) -> LoadedModel:
        """Open the model; one process after the other does it."""
        accelerator = setup.processes.accelerator
        return model_setup.open_through(self.opener, setup.args, setup.dtype, accelerator, setup.tokenizers)

    def after_opening(self, setup: Setup) -> None:
        """The model is open and frozen, nothing is encoded yet: networks to merge in, words to add."""

    def half_vae(self, setup: Setup) -> bool:
        """Whether the VAE computes in the weight dtype, else in float32."""
        return not setup.options.model.no_half_vae

    def scale_latents(self, args: Any, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents as the U-Net takes them."""
        return latents * self.family.latent_scale

    def prepare_text(self, setup: Setup) -> None:
        """Encode captions that are to be cached; leave the text encoders where the steps need them."""
        for encoder in setup.model.text_encoders:
            encoder.to(setup.processes.device)

    # What is trained

    @abstractmethod
    def make_target(self, setup: Setup) -> Target:
        """What is trained, on the device, with checkpointing and compiling done."""

    def before_first_step(self, setup: Setup, target: Target) -> None:
        """The optimizer is made: the cast of `--full_fp16` and `--full_bf16`, and last calls."""

    # What is written

    @abstractmethod
    def metadata(self, setup: Setup, feed: DataFeed, built: Built, epochs: int) -> Metadata:
        """A function (run, epoch) that gives the metadata of a written file; `setup.options` are the effective ones."""

    @abstractmethod
    def extension(self, setup: Setup) -> str:
        """Ending of the written files, with its dot; empty for folders."""


def train_by(recipe: Recipe, args: argparse.Namespace) -> None:
    """The whole run; returns early for `--debug_dataset` and `--dry_run`."""
    from library.training import assemble, loop

    recipe.opener.run = assemble.build_run(recipe, args)
    if recipe.opener.run is not None:
        loop.train(recipe.opener.run)
