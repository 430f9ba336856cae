"""What a network file holds, and what it does to single tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.messages import UserError, progress, write
from library.models.checkpoint import open_checkpoint
from library.models.family import family
from library.models.text_encoders import encode_rows
from library.options.network_tools import NetworkCheckConfig, NetworkInterrogateConfig
from library.runtime.devices import pick_device
from networks import lora
from networks.tool_files import SDXL, open_network

SHOWN_TOKENS = 100


def show(options: NetworkCheckConfig) -> None:
    """`check_lora_weights.py`."""
    show_file(options.file, options.show_all_keys)


def show_file(file: str, show_all_keys: bool = False) -> None:
    """Write one line a tensor: key, shape, mean and smallest absolute value; up and down tensors first.

    Args:
        show_all_keys: the other tensors as well.
    """
    checkpoint = open_checkpoint(file)
    first = [key for key in checkpoint.tensors if "lora_up" in key or "lora_down" in key]
    write(f"number of LoRA tensors: {len(first)}")
    _show_tensors(checkpoint, first)
    if show_all_keys:
        rest = [key for key in checkpoint.tensors if key not in set(first)]
        write(f"number of other tensors: {len(rest)}")
        _show_tensors(checkpoint, rest)


def _show_tensors(checkpoint: Any, keys: list[str]) -> None:
    lines = {}
    for key, value in checkpoint.stream(keys):
        size = value.float().abs()
        shape = str(tuple(value.shape)).replace(", ", "-")
        numbers = f"{size.mean().item()},{size.min().item()}" if value.numel() else "-,-"
        lines[key] = f"{key},{shape},{numbers}"
    for key in keys:
        write(lines[key])


@torch.no_grad()
def interrogate_network(options: NetworkInterrogateConfig) -> None:
    """`lora_interrogator.py`: the tokens whose encoding the network changes most."""
    assert options.sd_model is not None and options.model is not None
    file = open_network(options.model)
    if file.kind == SDXL:
        raise UserError(f"{options.model} is {SDXL}", "give a network for SD 1.x or 2.x")
    if not any(name.startswith("lora_te") for name in file.pairs):
        write(f"{options.model} has no part for the text encoder")
        return
    device = pick_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = family("sd").load(options.sd_model, v2=options.v2, v_parameterization=None, dtype=dtype, device=device)
    text_encoder, tokenizer = model.text_encoders[0], model.tokenizers[0]
    network, weights = lora.create_network_from_weights(
        1.0, options.model, model.vae, text_encoder, model.unet, for_inference=True
    )
    network.apply_to(text_encoder, model.unet, True, False)
    network.load_state_dict(weights, False)
    network.to(device, dtype)
    ids = list(range(max(tokenizer.all_special_ids) + 1))
    scores = token_scores(text_encoder, network, tokenizer, ids, options.batch_size, options.clip_skip)
    order = sorted(ids, key=lambda token: -scores[token])
    for place, token in enumerate(order[:SHOWN_TOKENS]):
        write(f"[{place:3d}] {token:5d} {tokenizer.decode(token)}: {scores[token]:.5f}")


def token_scores(
    text_encoder: nn.Module, network: Any, tokenizer: Any, ids: list[int], batch_size: int, clip_skip: int | None
) -> list[float]:
    """Mean absolute change of the encoding of each token, alone between start and end, by an applied network."""
    device = next(text_encoder.parameters()).device
    scores: list[float] = []
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    for batch in progress(batches, "token batches"):
        rows = [[tokenizer.bos_token_id, token, tokenizer.eos_token_id] for token in batch]
        tokens = torch.tensor(rows, device=device)
        encoded: list[Tensor] = []
        for enabled in (False, True):
            network.set_enabled(enabled)
            encoded.append(encode_rows(text_encoder, tokens, clip_skip).float())
        scores += (encoded[1] - encoded[0]).abs().mean((1, 2)).tolist()
    return scores
