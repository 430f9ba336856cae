"""The recipes of the scripts that train a whole model: `train_db.py`, `fine_tune.py`, `sdxl_train.py`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from library.data.dataset import Dataset
from library.data.support import SUPPORT
from library.data.text_cache import require_fixed_captions
from library.messages import log
from library.models.text_encoders import enable_gradient_checkpointing
from library.options.model_training import block_rates
from library.options.sdxl import BUCKET_STEPS
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training import model_setup
from library.training.hooked_trainer import HookedSdxlTrainer, HookedTrainer
from library.training.kept_weights import KeptWeights
from library.training.metadata import modelspec_for_run
from library.training.metrics import model_step_logs
from library.training.model_parts import TEXT_BLOCK_CLASSES, Rates, trained_modules
from library.training.recipes.recipe import Recipe, Setup
from library.training.saving import ModelFormat, model_format
from library.training.targets.model import ModelTarget

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.feed import DataFeed
    from library.training.optimizers import Built
    from library.training.saver import Metadata


class ModelRecipe(Recipe):
    """A whole model of SD 1.x or 2.x; subclasses say which script's rules hold."""

    spreads = ("FSDP", "--deepspeed")

    step_logs = staticmethod(model_step_logs)
    opener_class: type[HookedTrainer] = HookedTrainer

    def __init__(self) -> None:
        super().__init__(self.opener_class())
        self.kept = KeptWeights()

    def after_opening(self, setup: Setup) -> None:
        """The files can be written; what halving will take from the parts that do not learn is kept for them."""
        if self.written_as(setup).stability_layout:
            self.family.require_single_file(setup.model)
        if setup.dtype == torch.float32:
            return
        rates, model = self.rates(setup.options), setup.model
        frozen = [model.vae] if self.half_vae(setup) else []
        frozen += [] if rates.trains_unet else [model.unet]
        if not self.caches_text(setup.options):
            frozen += [e for e, rate in zip(model.text_encoders, rates.text, strict=True) if not rate]
        for module in frozen:
            self.kept.keep(module, setup.dtype)

    def trains_text(self, options: Resolved) -> bool:
        """Whether the text encoders learn, as far as their rates let them."""
        return options.model_training.train_text_encoder

    def text_rates(self, options: Resolved) -> list[float | None]:
        """The rate given for each text encoder, None where none is."""
        return [options.model_training.learning_rate_te]

    def rates(self, options: Resolved) -> Rates:
        """Rates of all parts; a part that has none of its own takes `--learning_rate`."""
        rate, given = options.optimizer.learning_rate, self.text_rates(options)
        trains_text = self.trains_text(options)
        blocks = block_rates(options.model_training.block_lr)
        return Rates(
            unet=rate,
            text=tuple((rate if own is None else own) if trains_text else 0.0 for own in given),
            blocks=None if blocks is None else tuple(blocks),
            apart=any(own is not None for own in given),
        )

    def make_target(self, setup: Setup) -> ModelTarget:
        options = setup.options
        rates = self.rates(options)
        self._place_models(setup, rates)
        model_setup.checkpoint_and_compile(self.family, setup)
        if options.precision.gradient_checkpointing and rates.trains_text:
            for encoder in setup.model.text_encoders:
                enable_gradient_checkpointing(encoder)
        self._spread(setup, rates)
        mixed = setup.dtype != torch.float32
        return ModelTarget(
            family=self.family,
            model=setup.model,
            rates=rates,
            clip_skip=options.model.clip_skip,
            max_token_length=options.model.max_token_length,
            written_as=self.written_as(setup),
            text_steps=text_steps(options),
            weighted_captions=options.model.weighted_captions,
            short_captions=options.model_training.no_token_padding,
            autocast=setup.processes.autocast if mixed else contextlib.nullcontext,
            input_dtype=self.input_dtype(setup),
            kept=self.kept,
            parallel=setup.parallel,
        )

    def _spread(self, setup: Setup, rates: Rates) -> None:
        """Lay what learns on the processes."""
        setup.parallel.place(
            trained_modules(setup.model, rates), (*self.family.repeated_block_classes, *TEXT_BLOCK_CLASSES)
        )

    def input_dtype(self, setup: Setup) -> torch.dtype | None:
        """Of the latents that the U-Net is given; they stay float32 unless its weights are halved."""
        return setup.dtype if setup.options.precision.halves_trained else None

    def _place_models(self, setup: Setup, rates: Rates) -> None:
        """On the device: what learns in float32 unless `--full_*` halves it, the rest in the weight dtype."""
        device, model = setup.processes.device, setup.model
        learning = setup.dtype if setup.options.precision.halves_trained else None
        unet_dtype = learning if rates.trains_unet else setup.dtype
        wrap_model(model.unet, WrapPolicy(device=device, dtype=unet_dtype), family=self.family.name)
        if self.caches_text(setup.options):
            return
        for encoder, rate in zip(model.text_encoders, rates.text, strict=True):
            encoder.to(device, learning if rate else setup.dtype)

    def caches_text(self, options: Resolved) -> bool:
        """Whether the steps need no text encoders, because all captions are encoded before."""
        return False

    def written_as(self, setup: Setup) -> ModelFormat:
        """Form of the written files."""
        options = setup.options
        return model_format(
            options.saving.save_model_as,
            use_safetensors=options.model_training.use_safetensors,
            from_stability_layout=setup.model.is_stability_layout,
        )

    def extension(self, setup: Setup) -> str:
        return self.written_as(setup).extension

    def metadata(self, setup: Setup, feed: DataFeed, built: Built, epochs: int) -> Metadata:
        """ModelSpec; a diffusers folder and a pickle have no place for it."""
        form = self.written_as(setup)
        if not (form.stability_layout and form.safetensors):
            return lambda run, epoch: {}
        return lambda run, epoch: modelspec_for_run(
            setup.options,
            setup.group.datasets,
            kind="checkpoint",
            sdxl=self.family.name == "sdxl",
            is_stability_layout=True,
        )


class DreamBoothRecipe(ModelRecipe):
    """`train_db.py`: a few pictures of a subject; the text encoder learns too unless told otherwise."""

    script = "train_db.py"
    tracker = "dreambooth"
    support = SUPPORT[script]

    def trains_text(self, options: Resolved) -> bool:
        return text_steps(options) is None or bool(text_steps(options))


class FineTuneRecipe(ModelRecipe):
    """`fine_tune.py`: pictures of a metadata file."""

    script = "fine_tune.py"
    tracker = "finetuning"
    support = SUPPORT[script]
    # In pixels: what the VAE and the U-Net's three halvings divide evenly.
    even_steps = 64

    def check_group(self, args: Any, group: Any) -> None:
        """Tell of bucket sizes that the U-Net halves unevenly; later releases of sd-scripts refuse them here."""
        bucketed = [
            one.settings for one in getattr(group, "datasets", ()) if isinstance(one, Dataset) and one.bucket_limits[0]
        ]
        uneven = {one.bucket_reso_steps for one in bucketed if one.bucket_reso_steps % self.even_steps}
        for steps in sorted(uneven):
            log.warning(
                "bucket_reso_steps %d is no multiple of %d: the U-Net halves some sizes unevenly, %d is better",
                *(steps, self.even_steps, self.even_steps),
            )


class SdxlModelRecipe(ModelRecipe):
    """`sdxl_train.py`: an SDXL model, with two text encoders and rates for the U-Net's blocks."""

    script = "sdxl_train.py"
    tracker = "finetuning"
    says_token_ids = True
    support = SUPPORT[script]
    opener_class = HookedSdxlTrainer

    def check_group(self, args: Any, group: Any) -> None:
        if args.cache_text_encoder_outputs:
            require_fixed_captions(getattr(group, "datasets", [group]))
        group.verify_bucket_reso_steps(BUCKET_STEPS)

    def text_rates(self, options: Resolved) -> list[float | None]:
        config = options.model_training
        return [config.learning_rate_te1, config.learning_rate_te2]

    def input_dtype(self, setup: Setup) -> torch.dtype | None:
        return setup.dtype

    def caches_text(self, options: Resolved) -> bool:
        return options.sdxl.cache_text_encoder_outputs

    def prepare_text(self, setup: Setup) -> None:
        """With `--cache_text_encoder_outputs` the encoders work once, in float32, and leave the device."""
        if not self.caches_text(setup.options):
            super().prepare_text(setup)
            return
        model, processes = setup.model, setup.processes
        encoders = model.text_encoders
        for encoder in encoders:
            encoder.to(processes.device, torch.float32)
        setup.group.cache_text_encoder_outputs(
            setup.tokenizers,
            encoders,
            processes.device,
            torch.float32,
            setup.options.sdxl.cache_text_encoder_outputs_to_disk,
            processes.is_main,
        )
        processes.barrier()
        for encoder in encoders:
            encoder.to("cpu")


def text_steps(options: Resolved) -> int | None:
    """Updates after which the text encoder stops; None for never, 0 when it never learns."""
    stop = options.model_training.stop_text_encoder_training
    return None if stop is None else max(0, stop)
