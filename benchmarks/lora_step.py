"""Speed of a LoRA step, a forward pass and a full step against diffusers + peft; prints ratios from one run.

python -m benchmarks.lora_step [--rounds 7] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.models import SMALL, Subject, backward, batch_for, compare, forward, full_pair, lora_pair


def step_of(subject: Subject, batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """Forward, backward and an AdamW update."""
    optimizer = torch.optim.AdamW(subject.parameters, lr=1e-5, fused=True)

    def step() -> None:
        backward(subject, batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_of(subject: Subject, batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            forward(subject, batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one measures least noise")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = batch_for(SMALL, 2, 32, options.device)
    lora = lora_pair(SMALL, 8, options.device)
    full = full_pair(SMALL, options.device)
    kind = "CPU time" if options.device == "cpu" else "wall time"
    print(f"channels {SMALL.block_out_channels}, latents 32x32, batch 2, float32, rank 8, {options.device}: {kind}")
    for name, make, pair in (
        ("LoRA step", step_of, lora),
        ("LoRA forward", forward_of, lora),
        ("forward", forward_of, full),
        ("full step", step_of, full),
    ):
        times = compare({s.name: make(s, batch) for s in pair}, rounds=options.rounds, device=options.device)
        ours, theirs = times.values()
        words = ", ".join(f"{who} {seconds * 1e3:.0f} ms" for who, seconds in times.items())
        print(f"{name}: ratio {ours / theirs:.3f} ({words})")


if __name__ == "__main__":
    main()
