"""The short SDXL picture script: prompts as they are, one for each text encoder, and a picture file."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.generation.command import open_engine
from library.generation.engine import Engine, pictures
from library.generation.networks import NetworkSpec, check_networks
from library.generation.output import save_picture
from library.generation.request import ImageRequest
from library.generation.text import special_ids
from library.messages import UserError, log, warn_once
from library.models.family import TextCondition, family
from library.models.tokenizers import text_ids
from library.options.image import ImageConfig
from library.options.image_model import ImageModelConfig
from library.prompts.chunks import CONTENT, padded_ids
from library.runtime.devices import pick_device

if TYPE_CHECKING:
    from library.options.minimal import MinimalConfig
    from library.options.parser import Resolved

STEPS = 50
SCALE = 7.0
SAMPLER = "euler"
STAMP = "%Y%m%d-%H%M%S"


def run(options: Resolved, *, network_module: str) -> None:
    """Draw what the command line or, in interactive mode, the user asks for.

    Args:
        network_module: import path of the module that opens `--lora_weights`.

    Raises:
        UserError: bad input.
    """
    config: MinimalConfig = options.minimal
    folder = Path(config.output_dir)
    if not folder.is_dir():
        raise UserError(f"folder {folder} not found", "make it, or name another one with --output_dir")
    specs = lora_specs(config.lora_weights, network_module)
    check_networks(specs)
    own = family("sdxl")
    engine = open_engine(own, _model(config, specs), ImageConfig(sampler=SAMPLER), noise_device="cpu")
    if not config.interactive:
        draw(engine, config.prompt, config.prompt2, config.negative_prompt, None, folder)
        return
    while prompt := _ask("prompt (empty to end): "):
        prompt2 = _ask("prompt for the second text encoder (empty for the same): ")
        negative = _ask("negative prompt: ")
        try:
            draw(engine, prompt, prompt2 or None, negative, _seed(_ask("seed (empty for any): ")), folder)
        except UserError as error:
            log.error(str(error))


def lora_specs(texts: Sequence[str], module: str) -> list[NetworkSpec]:
    """`FILE` or `FILE;MULTIPLIER` each -> one record per network.

    Raises:
        UserError: a multiplier that is no number.
    """
    specs = []
    for text in texts:
        file, _, multiplier = text.partition(";")
        try:
            specs.append(NetworkSpec(module, file, float(multiplier) if multiplier else 1.0))
        except ValueError as error:
            raise UserError(f"--lora_weights {text}: {multiplier!r} is no number", "write FILE;MULTIPLIER") from error
    return specs


def draw(engine: Engine, prompt: str, prompt2: str | None, negative: str, seed: int | None, folder: Path) -> Path:
    """Draw one picture into a new file of the folder.

    Args:
        prompt2: of the second text encoder; None for the same.
        seed: None for any.
    """
    seed = random.randint(0, 0x7FFFFFFF) if seed is None else seed
    side = engine.family.default_size
    # The text goes in encoded: in these prompts no word and no bracket has a meaning of its own.
    request = ImageRequest(prompt="", width=side, height=side, steps=STEPS, scale=SCALE, seed=seed)
    text = encode(engine, prompt, prompt if prompt2 is None else prompt2, negative)
    image = pictures(engine.decode(engine.latents([request], text=text)))[0]
    path = _free_path(folder)
    save_picture(image, path, {})
    log.info(f"{path}: seed {seed}")
    return path


@torch.no_grad()
def encode(engine: Engine, prompt: str, prompt2: str, negative: str) -> TextCondition:
    """Two rows, negative and prompt, of 77 tokens; each encoder reads its own prompt."""
    tokenizers = engine.model.tokenizers
    ids = []
    for tokenizer, text in zip(tokenizers, (prompt, prompt2), strict=True):
        rows = text_ids(tokenizer, [negative, text])
        if any(len(row) > CONTENT for row in rows):
            warn_once(f"prompt cut to {CONTENT} tokens")
        padded = [padded_ids(row[:CONTENT], special_ids(tokenizer), 1) for row in rows]
        ids.append(torch.tensor(padded, device=engine.device)[:, None])
    return engine.family.encode_text(engine.model.text_encoders, ids, tokenizers=tokenizers, dtype=engine.dtype)


def _model(config: MinimalConfig, specs: Sequence[NetworkSpec]) -> ImageModelConfig:
    return ImageModelConfig(
        ckpt=config.ckpt_path,
        fp16=torch.device(pick_device()).type == "cuda",
        no_half_vae=True,
        network_module=[spec.module for spec in specs],
        network_weights=[spec.weights for spec in specs],
        network_mul=[spec.multiplier for spec in specs],
        network_merge=True,
    )


def _ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        return ""


def _seed(text: str) -> int | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"seed {text!r} is no whole number", "type one, or nothing") from error


def _free_path(folder: Path) -> Path:
    stamp, number = datetime.datetime.now().strftime(STAMP), 0
    while (path := folder / f"image_{stamp}_{number:03d}.png").exists():
        number += 1
    return path
