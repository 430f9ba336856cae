"""Trains U-Net and text encoder of the shipped small model with this project's own loop (15 minutes on 2 cores).

    python examples/quickstart/make_model/train_base.py --model untrained --pictures pictures --output trained

Goes on from `OUTPUT/base-state` when that is there. What is written is the moving average of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from library import messages
from library.data.cache import cache_latents
from library.data.config import resolve_datasets
from library.data.config_schema import Support
from library.data.group import build_group
from library.data.sources import scan
from library.diffusion.schedule import make_schedule
from library.models.family import family
from library.models.tokenizers import input_ids
from library.options.dataset import DatasetConfig
from library.options.objective import ObjectiveConfig
from library.options.optimizer import OptimizerConfig
from library.options.samples import SamplesConfig
from library.options.saving import SavingConfig
from library.runtime.processes import start_processes
from library.training import loop
from library.training.draws import Draws
from library.training.feed import DataFeed
from library.training.guard import FiniteGuard
from library.training.latents import LatentEncoder
from library.training.logbook import LogBook
from library.training.model_parts import Rates
from library.training.model_setup import CacheEncoder
from library.training.optimizers import make_optimizer
from library.training.run import Position, Run
from library.training.samples import SamplePictures
from library.training.saver import Saver
from library.training.saving import ModelFormat
from library.training.schedules import make_lr_schedule
from library.training.state import load_state
from library.training.targets.model import ModelTarget

STEPS, BATCH_SIZE, SEED = 3000, 32, 0
EMA_DECAY = 0.995


class AveragedTarget(ModelTarget):
    """The model, and an exponential moving average of its weights, which is what is written."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.average = {name: tensor.detach().clone() for name, tensor in super().state_dict().items()}
        self.updates = torch.zeros((), dtype=torch.int64)

    def on_step_end(self) -> dict[str, Any]:
        self.updates += 1
        decay = min(EMA_DECAY, (1 + float(self.updates)) / (10 + float(self.updates)))
        for name, tensor in super().state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor.detach(), 1 - decay)
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        averages = {f"average.{name}": tensor for name, tensor in self.average.items()}
        return {**super().state_dict(), **averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        for name, tensor in self.average.items():
            tensor.copy_(state[f"average.{name}"])
        self.updates.copy_(state["updates"])

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int) -> None:
        raw = {name: tensor.detach().clone() for name, tensor in super().state_dict().items()}
        super().load_state_dict(self.average)
        super().save(path, dtype, metadata, epoch=epoch, step=step)
        super().load_state_dict(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder that holds 1_shapes")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    messages.set_up()

    processes = start_processes(mixed_precision="no")
    sd = family("sd")
    model = sd.load(args.model)
    for part in (model.vae, model.unet, *model.text_encoders):
        part.to(processes.device)
    tokenizer = model.tokenizers[0]
    (settings,) = resolve_datasets(
        DatasetConfig(
            train_data_dir=str(args.pictures),
            caption_extension=".txt",
            resolution="64",
            train_batch_size=BATCH_SIZE,
            caption_dropout_rate=0.1,
        ),
        support=Support(),
    )
    group = build_group(
        [settings], [scan(settings)], tokenize=lambda text: (input_ids(tokenizer, [text])[0], None), seed=SEED
    )
    draws = Draws(SEED, processes.device)
    cache_latents(group.datasets, CacheEncoder(model.vae, draws, processes.device), batch_size=64)

    target = AveragedTarget(
        family=sd, model=model, rates=Rates(unet=2e-3, text=(2e-3,)), written_as=ModelFormat(stability_layout=False)
    )
    config = OptimizerConfig(
        optimizer_type="AdamW",
        optimizer_args=["betas=0.9,0.99", "weight_decay=1e-4"],
        learning_rate=2e-3,
        lr_scheduler="cosine_with_min_lr",
        lr_warmup_steps=200,
        lr_scheduler_min_lr_ratio=0.05,
    )
    groups, names = target.parameter_groups()
    built = make_optimizer(groups, config)
    feed = DataFeed(
        group, seed=SEED, processes=processes, accumulation=1, workers=0, persistent=False, pin_memory=False
    )
    run = Run(
        target=target,
        feed=feed,
        objective=ObjectiveConfig(min_snr_gamma=5.0),
        v_prediction=False,
        noise_schedule=make_schedule().to(processes.device),
        draws=draws,
        latents=LatentEncoder(model.vae, lambda latents: latents * sd.latent_scale, draws, processes.device),
        optimizer=built.optimizer,
        lr_schedule=make_lr_schedule(built.optimizer, config, STEPS),
        scaler=None,
        guard=FiniteGuard(built.optimizer),
        processes=processes,
        autocast=contextlib.nullcontext,
        accumulation=1,
        max_grad_norm=1.0,
        max_steps=STEPS,
        epochs=-(-STEPS // feed.batches_per_epoch),
        seed=SEED,
        log=LogBook(total=STEPS, pictures_per_update=BATCH_SIZE, group_names=names),
        saver=Saver(
            SavingConfig(output_dir=str(args.output), output_name="base", save_every_n_epochs=2, save_state=True),
            extension="",
            main=processes.is_main,
        ),
        samples=SamplePictures(SamplesConfig(), folder=args.output, name="base"),
        position=Position(),
    )
    state = args.output / "base-state"
    if state.is_dir():
        load_state(run, state)
    loop.train(run)


if __name__ == "__main__":
    messages.run(main)
