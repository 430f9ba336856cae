"""Sample pictures while training: when, and the call of the generation engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import log
from library.training.ema import FILE_MARK
from library.training.trackers import log_picture

if TYPE_CHECKING:
    from library.options.samples import SamplesConfig
    from library.training.hooks import Hooks
    from library.training.run import Run


class SamplePictures:
    """Decides whether a step or epoch is one for pictures and has them drawn.

    Args:
        config: the sampling options.
        folder: `output_dir`; pictures go to `sample/` in it.
        name: `output_name` or None.
        live: the caller's namespace, where a hook may change the options while the run goes.
        hooks: of a trainer, whose `sample_images` is called at every step when it is overridden.
        clip_skip, seed: as for the training.
    """

    def __init__(
        self,
        config: SamplesConfig,
        *,
        folder: Path,
        name: str | None,
        live: Any = None,
        hooks: Hooks | None = None,
        clip_skip: int | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.live = config if live is None else live
        self.folder = folder
        self.name = name
        self.hooks = hooks
        self.clip_skip = clip_skip
        self.seed = seed

    def before_training(self, run: Run) -> None:
        if self.config.sample_at_first and run.position.step == 0:
            self._draw(run, 0)

    def after_update(self, run: Run) -> None:
        self._after(run, None)

    def after_epoch(self, run: Run, epoch: int) -> None:
        self._after(run, epoch)

    def draw_if_due(self, run: Run, epoch: int | None, step: int) -> None:
        """What a trainer's base `sample_images` does."""
        if is_due(self.live, epoch, step):
            self._draw(run, epoch)

    def _after(self, run: Run, epoch: int | None) -> None:
        if self.hooks is not None and self.hooks.overridden("sample_images"):
            self._call_hook(run, epoch)
        else:
            self.draw_if_due(run, epoch, run.position.step)

    def _call_hook(self, run: Run, epoch: int | None) -> None:
        assert self.hooks is not None
        model, accelerator = run.target.model, run.processes.accelerator
        encoders = model.text_encoders if len(model.text_encoders) > 1 else model.text_encoders[0]
        step, device = run.position.step, run.processes.device
        self.hooks.sample_images(
            accelerator, self.live, epoch, step, device, model.vae, model.tokenizers, encoders, model.unet
        )

    def _draw(self, run: Run, epoch: int | None) -> None:
        path = self.live.sample_prompts
        if not path or not Path(path).is_file():
            log.warning("no sample pictures: there is no prompt file %s", path)
            return
        with run.log.aside(run), tempfile.TemporaryDirectory() as unseen:
            if run.processes.is_main:
                self._draw_file(run, Path(path), epoch, self.folder)
            elif run.parallel.spread:
                # the first process computes with the weights of all
                self._draw_file(run, Path(path), epoch, Path(unseen))
            run.processes.barrier()

    def _draw_file(self, run: Run, path: Path, epoch: int | None, folder: Path) -> None:
        from library.generation.sampling import read_prompts
        from library.training.optimizers import set_training

        prompts = read_prompts(path)
        set_training(run.optimizer, False)
        self._draw_prompts(run, prompts, epoch, self.name, folder, average=False)
        if run.ema:
            with run.ema.in_place():
                self._draw_prompts(run, prompts, epoch, (self.name or "") + FILE_MARK, folder, average=True)
        set_training(run.optimizer, True)

    def _draw_prompts(
        self, run: Run, prompts: Any, epoch: int | None, name: str | None, folder: Path, *, average: bool
    ) -> None:
        from library.generation.sampling import draw_samples
        from library.runtime.precision import weight_dtype

        drawn = draw_samples(
            run.target.family,
            run.target.model,
            prompts,
            output_dir=folder,
            output_name=name,
            epoch=epoch,
            step=run.position.step,
            sampler=self.config.sample_sampler,
            clip_skip=self.clip_skip,
            device=run.processes.device,
            autocast_dtype=weight_dtype(run.processes.accelerator.mixed_precision),
            seed=self.seed,
            modules=run.target.extra_modules(),
            words=run.target.words,
        )
        for one in drawn:
            path = one.path.relative_to(folder).as_posix()
            shown = {"index": one.index, "prompt": one.prompt.prompt, "seed": one.seed, "ema": average}
            run.log.event(run, "sample", path=path, **shown)
            log_picture(run.processes.accelerator, f"sample_{one.index}", one.path, one.prompt.prompt, average)


def is_due(options: Any, epoch: int | None, step: int) -> bool:
    """Whether pictures are drawn now: with `sample_every_n_epochs` only at epoch ends, else at every n-th update."""
    every_epochs, every_steps = options.sample_every_n_epochs, options.sample_every_n_steps
    if every_epochs:
        return epoch is not None and epoch % every_epochs == 0
    return bool(every_steps) and epoch is None and step % every_steps == 0
