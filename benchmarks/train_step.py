"""Speed of a training step, LoRA and whole U-Net, beside diffusers + peft written plainly, in the same run.

    python -m benchmarks.train_step              (`table` where there is a GPU, else `ratios`)
    python -m benchmarks.train_step ratios       SD 1.5 and SDXL in little, float32, AdamW, in turns
    python -m benchmarks.train_step table        SDXL at full size, bfloat16, random weights; for a GPU
    python -m benchmarks.train_step table --size tiny --device cpu --eager     (does it run)

The table has a line a setting and side: seconds a step, pictures a second, peak memory, kernels a step, the share of
the time in which the device computes, and the share of the matrix peak that this card reaches in bfloat16. LoRAs learn
with AdamW, whole U-Nets with Adafactor: here inside the backward pass, there after it. Latents and text are given, as
in a run with both caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.counting import count
from benchmarks.device_use import busy_seconds, matrix_peak
from benchmarks.models import (
    SHAPES,
    Batch,
    Shape,
    Subject,
    add_own_lora,
    add_peft_lora,
    all_trained,
    backward,
    batch_for,
    compare,
    diffusers_unet,
    family_of,
    forward,
    full_pair,
    lora_pair,
    own_unet,
    stopwatch,
)
from library.models.family import family
from library.options.optimizer import OptimizerConfig
from library.runtime.devices import empty_cache, memory_stats, pick_device, reset_peak_memory
from library.runtime.peaks import peak_flops
from library.runtime.precision import autocast
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training.optimizers import make_optimizer
from library.training.stochastic_rounding import StochasticRounding
from library.training.work import WorkCounter

LOW = torch.bfloat16
WARM_UP = 3
COLUMNS = (
    *("setting", "side", "s a step", "pictures/s", "peak GiB", "kernels"),
    *("device busy", "of the matrix peak", "times as fast"),
)


# Ratios


def plain_step(subject: Subject, batch: Batch) -> Callable[[], None]:
    """Forward, backward and an AdamW update, float32."""
    optimizer = torch.optim.AdamW(subject.parameters, lr=1e-5, fused=True)

    def step() -> None:
        backward(subject, batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_forward(subject: Subject, batch: Batch) -> Callable[[], None]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            forward(subject, batch)

    return run


def print_ratios(shapes: dict[str, Shape], trained: Sequence[str], device: torch.device, rounds: int) -> None:
    """A line a piece of work: this project's time over the others'."""
    kind = "CPU time" if device.type == "cpu" else "wall time"
    for name, shape in shapes.items():
        widths = "/".join(str(width) for width in shape.config.block_out_channels)
        head = f"{name}, channels {widths}, latents {shape.side}x{shape.side}, batch 2, float32, rank {shape.rank}"
        print(f"{head}, {device}, {kind}")
        batch = batch_for(shape.config, 2, shape.side, str(device))
        for what in trained:
            pair = PAIRS[what](shape, str(device))
            for work, make in ((f"{what} step", plain_step), (f"{what} forward", plain_forward)):
                works = {subject.name: make(subject, batch) for subject in pair}
                times = compare(works, rounds=rounds, device=str(device))
                ours, theirs = times.values()
                words = ", ".join(f"{who} {seconds * 1e3:.0f} ms" for who, seconds in times.items())
                print(f"  {work}: ratio {ours / theirs:.3f} ({words})", flush=True)


PAIRS = {"lora": lora_pair, "full": full_pair}


# Table


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A line of the table.

    Attributes:
        trained: `lora` or `full`.
        weights: number format of the U-Net.
        checkpointing: every how many blocks; 0 is off.
    """

    trained: str
    batch: int = 1
    weights: torch.dtype = LOW
    checkpointing: int = 0
    compiled: bool = False

    def __str__(self) -> str:
        interval = {0: "no checkpointing", 1: "checkpointing every block", 2: "checkpointing every second block"}
        weights = str(self.weights).removeprefix("torch.")
        words = [self.trained, f"batch {self.batch}", weights, interval[self.checkpointing]]
        return ", ".join([*words, "compiled" if self.compiled else "eager"])


def settings(trained: Sequence[str] = ("lora", "full")) -> list[Setting]:
    """All lines: LoRA by batch and checkpointing, the whole U-Net by number format; eager, then compiled."""
    lines = []
    for compiled in (False, True):
        lines += [
            Setting(trained="lora", batch=b, checkpointing=c, compiled=compiled) for b in (1, 4) for c in (0, 1, 2)
        ]
        lines += [Setting(trained="full", weights=w, checkpointing=1, compiled=compiled) for w in (LOW, torch.float32)]
    return [line for line in lines if line.trained in trained]


@dataclass(frozen=True)
class Result:
    """What was measured of a step: bytes, kernels and seconds; None where this device or setting does not say."""

    seconds: float
    peak: int | None
    kernels: int | None
    busy: float | None
    flops: float


def own(shape: Shape, setting: Setting, device: torch.device) -> tuple[Subject, Callable[[], None]]:
    """(this project's U-Net prepared in the order of a run, what updates its weights after the backward pass)."""
    unet = own_unet(shape.config, str(device), setting.weights)
    if setting.trained == "lora":
        subject = add_own_lora(unet, shape.rank, str(device))
        update = fused_adamw(subject)
    else:
        subject = all_trained("this project", unet)
        arguments = ["relative_step=False", "scale_parameter=False"]
        config = OptimizerConfig(
            optimizer_type="AdaFactor",
            optimizer_args=arguments,
            learning_rate=1e-5,
            max_grad_norm=0.0,
            fused_backward_pass=True,
        )
        rounding = StochasticRounding(0) if setting.weights == LOW else None
        optimizer: Any = make_optimizer(subject.parameters, config, rounding=rounding).optimizer
        update = optimizer.finish_backward
    kind = family_of(shape.config)
    policy = WrapPolicy(
        device=device,
        checkpointing_interval=setting.checkpointing,
        compile_backend="inductor" if setting.compiled else None,
    )
    wrap_model(unet, policy, family=kind, repeated_block_classes=family(kind).repeated_block_classes)
    return subject, update


def theirs(shape: Shape, setting: Setting, device: torch.device) -> tuple[Subject, Callable[[], None]]:
    """The same of diffusers' U-Net and peft's LoRA; checkpointing there is all or nothing."""
    unet: Any = diffusers_unet(shape.config, str(device), setting.weights)
    if setting.trained == "lora":
        subject = add_peft_lora(unet, shape.rank)
        update = fused_adamw(subject)
    else:
        from transformers.optimization import Adafactor

        subject = all_trained("diffusers", unet)
        optimizer = Adafactor(subject.parameters, lr=1e-5, relative_step=False, scale_parameter=False)
        update = stepping(optimizer)
    if setting.checkpointing:
        unet.enable_gradient_checkpointing()
    if setting.compiled:
        unet.compile_repeated_blocks()
    return subject, update


def fused_adamw(subject: Subject) -> Callable[[], None]:
    return stepping(torch.optim.AdamW(subject.parameters, lr=1e-5, fused=True))


def stepping(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """An update after the backward pass."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def measure(make: Callable, shape: Shape, setting: Setting, device: torch.device, rounds: int) -> Result:
    """Steps in one go after a warm-up; what counts operators or profiles comes after the clock has stopped."""
    empty_cache(device)
    torch.compiler.reset()
    subject, update = make(shape, setting, device)
    batch = batch_for(shape.config, setting.batch, shape.side, str(device), LOW)

    def step() -> None:
        with autocast(device, LOW):
            prediction = forward(subject, batch)
        nn.functional.mse_loss(prediction.float(), batch.target).backward()
        update()

    for _ in range(WARM_UP):
        step()
    reset_peak_memory(device)
    clock = stopwatch(str(device))
    start = clock()
    for _ in range(rounds):
        step()
    seconds = (clock() - start) / rounds
    peak = None if device.type == "cpu" else memory_stats(device).peak
    busy = busy_seconds(step, device, rounds)
    work = WorkCounter(wanted=True)
    with work.counted(setting.batch):
        step()
    kernels = None if setting.compiled else count(step).kernels
    return Result(seconds, peak, kernels, busy, (work.per_picture or 0.0) * setting.batch)


def print_table(shape: Shape, lines: Sequence[Setting], device: torch.device, rounds: int, peak: float | None) -> None:
    """A row a setting and side; what does not fit in the device's memory says so."""
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for setting in lines:
        first: Result | None = None
        for name, make in SIDES.items():
            try:
                result = measure(make, shape, setting, device, rounds)
            except torch.cuda.OutOfMemoryError:
                result = None
            cells = [str(setting), name, *cells_of(result, setting, peak)]
            ratio = f"{result.seconds / first.seconds:.2f}" if first and result else ""
            print("| " + " | ".join([*cells, ratio]) + " |", flush=True)
            first = result if name == "this project" else first


def cells_of(result: Result | None, setting: Setting, peak: float | None) -> list[str]:
    """The numbers of a row as text; empty where there is none."""
    if result is None:
        return ["does not fit", "", "", "", "", ""]
    return [
        f"{result.seconds:.3f}",
        f"{setting.batch / result.seconds:.2f}",
        "" if result.peak is None else f"{result.peak / 2**30:.2f}",
        "" if result.kernels is None else str(result.kernels),
        "" if result.busy is None else f"{result.busy / result.seconds:.0%}",
        "" if peak is None else f"{result.flops / result.seconds / peak:.0%}",
    ]


SIDES = {"this project": own, "diffusers + peft": theirs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("ratios", "table"), help="default: by the device")
    parser.add_argument("--family", nargs="+", choices=("sd", "sdxl"), help="default: both, in the table sdxl")
    parser.add_argument("--train", nargs="+", choices=("lora", "full"), default=("lora", "full"))
    parser.add_argument("--size", choices=tuple(SHAPES), help="default: small, in the table full")
    parser.add_argument("--device", help="default: the best of this machine")
    parser.add_argument("--rounds", type=int, help="steps that are measured; default 7, in the table 10")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one measures least noise")
    parser.add_argument("--eager", action="store_true", help="leave the compiled lines of the table out")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if (args.what or ("ratios" if device.type == "cpu" else "table")) == "ratios":
        shapes = SHAPES[args.size or "small"]
        chosen = {name: shapes[name] for name in args.family or shapes}
        print_ratios(chosen, args.train, device, args.rounds or 7)
        return
    size = args.size or "full"
    peak = matrix_peak(device) if device.type != "cpu" else None
    stated = peak_flops(device, LOW)
    words = f", matrix peak {peak / 1e12:.0f} TFLOP/s measured" if peak else ""
    words += f", {stated / 1e12:.0f} by its maker" if stated else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    lines = [line for line in settings(args.train) if not (args.eager and line.compiled)]
    for name in args.family or ["sdxl"]:
        print(f"\n{name}, {size} size, bfloat16, {where}, torch {torch.__version__}{words}\n")
        print_table(SHAPES[size][name], lines, device, args.rounds or 10, peak)


if __name__ == "__main__":
    main()
