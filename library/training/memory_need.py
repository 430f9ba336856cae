"""How much memory a run will need, from shapes alone, said before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.messages import log
from library.models.family import TextCondition
from library.models.text_encoders import projection_of, transformer_of
from library.models.tokenizers import count_chunks
from library.options.registries import find_optimizer
from library.runtime.shape_memory import LiveBytes, as_on_a_device, on_meta
from library.training.fused_backward import FusedBackward
from library.training.optimizers import ROUNDED_AT_ONCE, optimizer_name

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.run import Run

GIB = 2**30
# Korthikanti et al. 2022, section 4.1, with fused attention: bytes that a transformer layer keeps for each of
# (tokens x width), in half precision; a recomputed layer keeps its input only.
LAYER_BYTES, RECOMPUTED_BYTES = 34, 2


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on the training device at the peak of an update.

    Attributes:
        weights: of everything that lies there, trained or not.
        moments: what the optimizer keeps.
        step: activations, temporary tensors and gradients of the largest batch.
        text: the same of text encoders that learn.
        copies: float32 copies of bfloat16 weights while they are updated.
        batch: pictures, width and height of that batch.
    """

    weights: int
    moments: int
    step: int
    text: int
    copies: int
    batch: tuple[int, int, int]

    @property
    def total(self) -> int:
        # the update comes when the activations are gone; its copies need no more than they did
        return self.weights + self.moments + max(self.step + self.text, self.copies)

    def describe(self, there: int | None) -> str:
        """One line; `there` is the memory of the device, None if nobody knows."""
        count, width, height = self.batch
        room = f" of {gib(there)}" if there else ""
        return (
            f"memory: about {gib(self.total)}{room} (weights {gib(self.weights)}, optimizer {gib(self.moments)}, "
            f"a step with {count} pictures of {width}x{height} {gib(self.step + self.text)})"
        )


def gib(size: int) -> str:
    return f"{size / GIB:.2g} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"


def memory_need(run: Run, options: Resolved) -> MemoryNeed | None:
    """The peak of an update, or None where it cannot be worked out (models or attention of third parties)."""
    try:
        return _memory_need(run, options)
    except Exception as error:  # an estimate must never end a run
        log.debug("no estimate of the memory: %s: %s", type(error).__name__, error)
        return None


def _memory_need(run: Run, options: Resolved) -> MemoryNeed:
    trained = run.target.trainable_parameters()
    count, (width, height) = _largest_batch(run)
    half = sum(p.numel() for p in trained) if options.precision.full_bf16 else 0
    return MemoryNeed(
        weights=_weights(run),
        moments=moments_bytes(trained, options),
        step=_step(run, options, count, width, height),
        text=_text(run, options, count) if run.target.trains_text else 0,
        copies=12 * min(half, ROUNDED_AT_ONCE),
        batch=(count, width, height),
    )


def _largest_batch(run: Run) -> tuple[int, tuple[int, int]]:
    """Pictures and their size in the largest batch of an epoch."""
    batches = [batch for rank in run.feed.plan(1).batches for batch in rank]
    largest = max(batches, key=lambda batch: len(batch.items) * batch.bucket[0] * batch.bucket[1])
    return len(largest.items), largest.bucket


def _weights(run: Run) -> int:
    model, device = run.target.model, run.processes.device
    modules = [model.unet, *model.text_encoders, model.vae, *run.target.extra_modules()]
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    tensors |= {id(average): average for average in run.ema.averages}
    return sum(t.numel() * t.element_size() for t in tensors.values() if t.device.type == device.type)


def moments_bytes(trained: list[torch.nn.Parameter], options: Resolved) -> int:
    """What the optimizer keeps for what it trains."""
    record = find_optimizer(optimizer_name(options.optimizer))
    if record is not None and record.name == "AdaFactor":
        return sum(4 * _factored(p) for p in trained)
    return int((8 if record is None else record.state_bytes) * sum(p.numel() for p in trained))


def _factored(parameter: torch.nn.Parameter) -> int:
    """Numbers that Adafactor keeps for a weight: one a row and column of its matrices."""
    if parameter.dim() < 2:
        return parameter.numel()
    return parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]


def _step(run: Run, options: Resolved, count: int, width: int, height: int) -> int:
    """Peak of a forward and backward pass of the U-Net beside the weights, gradients of what is trained included."""
    model, target = run.target.model, run.target
    (unet,), table = on_meta([model.unet], target.extra_modules())
    for parameter in target.trainable_parameters():
        copy = table.get(id(parameter))
        if copy is not None and isinstance(run.optimizer, FusedBackward):
            copy.register_post_accumulate_grad_hook(_drop)
    half = run.autocast is not None and options.precision.mixed_precision != "no"
    dtype = torch.bfloat16 if half else None
    with torch.device("meta"):
        latents = torch.empty(count, 4, height // 8, width // 8, dtype=dtype)
        timesteps = torch.empty(count, dtype=torch.int64)
        sizes = dict.fromkeys(
            ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"), torch.empty(count, 2, dtype=torch.int64)
        )
        text = _condition(run, options, count, dtype)
    live = LiveBytes([*table.values(), latents, *text.hidden])
    with as_on_a_device(dtype), live:
        prediction = target.family.predict(unet, latents, timesteps, text, sizes)
        if prediction.requires_grad:
            torch.autograd.backward(prediction.float().square().mean())
    return live.peak


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _condition(run: Run, options: Resolved, count: int, dtype: torch.dtype | None) -> TextCondition:
    """Encoded captions without content; with gradients where text encoders learn."""
    encoders = run.target.model.text_encoders
    learns = run.target.trains_text
    tokens = 75 * count_chunks(options.model.max_token_length) + 2
    hidden = [
        torch.empty(count, tokens, encoder.config.hidden_size, dtype=dtype, requires_grad=learns)
        for encoder in encoders
    ]
    project = projection_of(encoders[-1]) if len(encoders) > 1 else None
    return TextCondition(hidden, None if project is None else torch.empty(count, project.out_features, dtype=dtype))


def _text(run: Run, options: Resolved, count: int) -> int:
    """What text encoders keep for the backward pass, by the rule for transformer layers, and their gradients."""
    tokens = 77 * count_chunks(options.model.max_token_length)
    precision = options.precision
    size = 1 if precision.mixed_precision != "no" else 2
    kept = RECOMPUTED_BYTES if precision.gradient_checkpointing else LAYER_BYTES
    total = 0
    for encoder in run.target.model.text_encoders:
        config: Any = encoder.config
        layers = len(transformer_of(encoder).encoder.layers)
        total += layers * kept * size * count * tokens * config.hidden_size
        total += sum(p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad)
    return total
