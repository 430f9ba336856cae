"""Trains the VAE of the shipped small model (about half an hour on one core; goes on where it was cut off).

    python examples/quickstart/make_model/train_vae.py --output vae

Loss: L1 + MSE on the picture, a light pull of the latents to zero, noise on the latents so that the decoder
forgives the U-Net's small errors. Few norm groups: with one channel a group a narrow VAE cannot hold colour.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
import shapes

LATENT_NOISE = 0.05
SD_SCALE = 0.18215
ROUNDS = ((3000, 2e-3), (3500, 1.5e-3))  # (steps, highest learning rate), a one-cycle schedule each
BATCH_SIZE = 16
CONFIG = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def random_outline(rng: random.Random, size: int = 64) -> Image.Image:
    """A blob with a random outline in random colours, so that the VAE can hold shapes of any kind."""
    side = size * shapes.OVERSAMPLING
    picture = Image.new("RGB", (side, side), rng.choice(list(shapes.BACKGROUNDS.values())))
    corners = rng.randint(3, 14)
    points = []
    for k in range(corners):
        angle, radius = 2 * math.pi * (k + rng.random() * 0.6) / corners, side * rng.uniform(0.12, 0.42)
        points.append((side / 2 + radius * math.cos(angle), side / 2 + radius * math.sin(angle)))
    ImageDraw.Draw(picture).polygon(points, fill=rng.choice(list(shapes.COLORS.values())))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def batch(step: int, count: int) -> torch.Tensor:
    """Pictures of one step, (count, 3, 64, 64) in [-1, 1]; a function of the step alone, so runs can be resumed."""
    rng = random.Random(f"vae-{step}")
    pictures = [
        random_outline(rng) if rng.random() < 0.3 else shapes.draw(shapes.random_look(rng), rng) for _ in range(count)
    ]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def standardise(vae: torch.nn.Module) -> None:
    """Give the latents the size that SD 1.x expects, and the posterior the variance the decoder was trained for.

    Every program multiplies latents by 0.18215 and wants a standard deviation near 1 then, so the factor goes into
    the 1x1 convolutions on both sides of the latents.
    """
    std = torch.cat([vae.encode(batch(-k, 64)).latent_dist.mean for k in range(1, 5)]).std().item()
    factor = 1 / (std * SD_SCALE)
    vae.quant_conv.weight[:4] *= factor
    vae.quant_conv.bias[:4] *= factor
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE * factor)
    vae.post_quant_conv.weight /= factor


def one_cycle(progress: float, highest: float, warmup: float = 0.05) -> float:
    """Learning rate at `progress` in [0, 1): up from a 25th within the warm-up, then down to almost nothing."""
    low, high, share = highest / 25, highest, progress / warmup
    if progress >= warmup:
        low, high, share = highest / 25e4, highest, 1 - (progress - warmup) / (1 - warmup)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def train_step(vae: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    pictures = batch(step, BATCH_SIZE)
    mean = vae.encode(pictures).latent_dist.mean
    decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
    difference = decoded - pictures
    l1 = difference.abs().mean()
    loss = l1 + difference.square().mean() + 1e-3 * mean.square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    if (step + 1) % 100 == 0:
        print(f"step {step + 1}  L1 {l1.item():.4f}  latent std {mean.std().item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=ROUNDS[0][1])
    state_file = args.output / "state.pt"
    args.output.mkdir(parents=True, exist_ok=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    step = 0
    for steps, rate in ROUNDS:
        for position in range(steps):
            if step >= first:
                train_step(vae, optimizer, step, one_cycle(position / steps, rate))
                if (step + 1) % 100 == 0:
                    state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                    torch.save(state, args.output / "state.tmp")
                    (args.output / "state.tmp").replace(state_file)
            step += 1

    standardise(vae)
    vae.register_to_config(scaling_factor=SD_SCALE)
    vae.save_pretrained(args.output / "vae")


if __name__ == "__main__":
    main()
