"""The metadata of a run's network files: made once before the loop, completed at each save."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from library.training.metadata import RunFacts, minimum_metadata, network_metadata, progress_metadata

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.feed import DataFeed
    from library.training.optimizers import Built
    from library.training.run import Run

MAX_SESSION_ID = 2**32


class NetworkRecord:
    """(run, epoch) -> metadata, as `Saver` asks for it.

    Args:
        trainer: whose `get_sai_model_spec` and `update_metadata` are asked.
        args: the caller's namespace.
        options: the effective options.
        feed: of the run.
        version: of the base model, e.g. `sd_v1`.
        built: the optimizer.
        network_args: what the network module got, or None without `--network_args`.
        epochs: of the whole run.
    """

    def __init__(
        self,
        *,
        trainer: Any,
        args: Any,
        options: Resolved,
        feed: DataFeed,
        version: str,
        built: Built,
        network_args: dict[str, Any] | None,
        epochs: int,
    ) -> None:
        self.trainer = trainer
        self.args = args
        self.options = options
        validation = getattr(feed.group, "validation", None)
        facts = RunFacts(
            session_id=random.SystemRandom().randint(0, MAX_SESSION_ID),
            started_at=time.time(),
            seed=args.seed,
            base_model_version=version,
            optimizer=built.name,
            optimizer_args=built.args_text,
            processes=feed.processes.count,
            batches_per_epoch=feed.batches_per_epoch,
            epochs=epochs,
            max_train_steps=args.max_train_steps,
            scale_weight_norms=args.scale_weight_norms,
            network_args=network_args,
            num_validation_images=0 if validation is None else validation.num_train_images,
        )
        self.lasting = network_metadata(options, facts, feed.group.datasets)

    def __call__(self, run: Run, epoch: int) -> dict[str, str]:
        metadata = {**self.lasting, **progress_metadata(epoch, run.position.step)}
        self.trainer.update_metadata(metadata, self.args)
        if self.options.network.no_metadata:
            metadata = minimum_metadata(metadata)
        return {**metadata, **self.trainer.get_sai_model_spec(self.args)}
