"""Sample pictures while training: when, and by which engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import log

if TYPE_CHECKING:
    from library.options.samples import SamplesConfig
    from library.training.hooks import Hooks
    from library.training.run import Run


class SamplePictures:
    """Decides whether a step or epoch is one for pictures and has them drawn by the generation engine.

    Args:
        config: the sampling options; read through `live` where a hook may change them.
        live: the caller's namespace, or None.
        folder: `output_dir`; pictures go to `sample/` in it.
        name: `output_name` or None.
        hooks: when given, a trainer's `sample_images` is called instead, at every step if it is overridden.
    """

    def __init__(
        self, config: SamplesConfig, *, live: Any, folder: Path, name: str | None, seed: int, hooks: Hooks | None
    ) -> None:
        self.config = config
        self.live = live if live is not None else config
        self.folder = folder
        self.name = name
        self.seed = seed
        self.hooks = hooks

    def before_training(self, run: Run) -> None:
        if self.config.sample_at_first and run.position.step == 0:
            self._draw(run, epoch=0)

    def after_update(self, run: Run) -> None:
        if self._overridden() or self._due(None, run.position.step):
            self._call(run, None)

    def after_epoch(self, run: Run, epoch: int) -> None:
        if self._overridden() or self._due(epoch, run.position.step):
            self._call(run, epoch)

    def draw_if_due(self, run: Run, epoch: int | None, step: int) -> None:
        """What a trainer's base `sample_images` does."""
        if self._due(epoch, step) or (epoch == 0 and self.config.sample_at_first):
            self._draw(run, epoch)

    def _overridden(self) -> bool:
        return self.hooks is not None and self.hooks.overridden("sample_images")

    def _due(self, epoch: int | None, step: int) -> bool:
        """With `sample_every_n_epochs` only epoch ends count; else every n-th update."""
        every_epochs, every_steps = self.live.sample_every_n_epochs, self.live.sample_every_n_steps
        if every_epochs:
            return epoch is not None and epoch % every_epochs == 0
        return bool(every_steps) and epoch is None and step % every_steps == 0

    def _call(self, run: Run, epoch: int | None) -> None:
        if self.hooks is None:
            self._draw(run, epoch)
            return
        model, target = run.target.model, run.target
        encoders = model.text_encoders if len(model.text_encoders) > 1 else model.text_encoders[0]
        accelerator = run.processes.accelerator
        self.hooks.sample_images(
            accelerator,
            target.args,  # type: ignore[attr-defined]
            epoch,
            run.position.step,
            accelerator.device,
            model.vae,
            model.tokenizers,
            encoders,
            model.unet,
        )

    def _draw(self, run: Run, epoch: int | None) -> None:
        path = self.live.sample_prompts
        if not path or not Path(path).is_file():
            log.warning("no sample pictures: there is no prompt file %s", path)
            return
        from library.generation.sampling import draw_samples, read_prompts

        draw_samples(run, read_prompts(Path(path)), epoch)
