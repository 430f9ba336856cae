"""CLIP text encoders: building, key names, hidden states, chunks, weighted captions.

Everything that reaches into a text encoder goes through here, because names inside transformers change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.dimensions import HEAD_SIZE, TextDimensions
from library.models.tokenizers import CHUNK, count_chunks, split_chunks

POSITION_IDS = "text_model.embeddings.position_ids"
PLAIN, PROJECTING = "CLIPTextModel", "CLIPTextModelWithProjection"


def text_config(dimensions: TextDimensions, class_name: str = PLAIN) -> dict[str, Any]:
    """`config.json` of a text encoder; bos, eos and pad are those of every published SD config, not the real ids."""
    return {
        "architectures": [class_name],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": dimensions.activation,
        "hidden_size": dimensions.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": dimensions.intermediate,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": dimensions.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, dimensions.width // HEAD_SIZE),
        "num_hidden_layers": dimensions.layers,
        "pad_token_id": 1,
        "projection_dim": dimensions.projection or (768 if dimensions.activation == "quick_gelu" else 512),
        "vocab_size": dimensions.vocabulary,
    }


def saved_text_config(text_encoder: nn.Module) -> dict[str, Any]:
    """`config.json` of an existing text encoder: the settings that every version of transformers knows."""
    config = text_encoder.config
    template = text_config(TextDimensions(HEAD_SIZE, 1, 1))
    return {key: getattr(config, key, value) for key, value in template.items()} | {
        "architectures": [PROJECTING if projection_of(text_encoder) is not None else PLAIN],
        "model_type": "clip_text_model",
    }


def empty_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """A text encoder without memory (meta device), for `library.models.assembly.fill`.

    Args:
        config: `config.json`; its `architectures` say whether the encoder has a projection.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from library.models.clip_text_model import CLIPTextModel

    known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "dtype")}
    kind = CLIPTextModelWithProjection if PROJECTING in (config.get("architectures") or ()) else CLIPTextModel
    with torch.device("meta"):
        model = kind(CLIPTextConfig(**known))
    return model.eval()


def restore_buffers(text_encoder: nn.Module, device: str | torch.device) -> None:
    """Give the position ids, which no file needs to hold, their values."""
    embeddings = transformer_of(text_encoder).embeddings
    positions = torch.arange(embeddings.position_embedding.weight.shape[0], device=device)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)


def exchanged_key(key: str) -> str:
    """A key of any version of transformers -> the name that files use (`text_model. ...`)."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def text_state_dict(text_encoder: nn.Module) -> dict[str, torch.Tensor]:
    """State dict under the exchanged names, without position ids."""
    state = {exchanged_key(key): value for key, value in text_encoder.state_dict().items()}
    state.pop(POSITION_IDS, None)
    return state


def adopt(text_encoder: nn.Module) -> nn.Module:
    """A text encoder that foreign code made, with the exchanged module names; others are handed back as they are."""
    if hasattr(text_encoder, "text_model") or not hasattr(text_encoder, "final_layer_norm"):
        return text_encoder
    from library.models.clip_text_model import CLIPTextModel

    return CLIPTextModel.around(text_encoder)


def transformer_of(text_encoder: nn.Module) -> Any:
    """The module with `embeddings`, `encoder` and `final_layer_norm`, under process wrappers and any version."""
    inner = getattr(text_encoder, "module", text_encoder)
    return getattr(inner, "text_model", inner)


def projection_of(text_encoder: nn.Module) -> nn.Module | None:
    """The layer that makes the pooled output, None where the encoder has none."""
    return getattr(getattr(text_encoder, "module", text_encoder), "text_projection", None)


def enable_gradient_checkpointing(text_encoder: nn.Module) -> None:
    """Recompute each layer in the backward pass."""
    inner = getattr(text_encoder, "module", text_encoder)
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def skipped_parameters(text_encoder: nn.Module, *, layers: int, final_norm: bool = False) -> list[nn.Parameter]:
    """Parameters of the last `layers` layers and, when asked for, of the final norm."""
    inner = transformer_of(text_encoder)
    blocks = list(inner.encoder.layers)
    skipped = blocks[len(blocks) - layers :] + ([inner.final_layer_norm] if final_norm else [])
    return [parameter for module in skipped for parameter in module.parameters()]


def penultimate_rows(text_encoder: nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) -> (penultimate hidden states, without final norm; last ones, normed), both (B, L, D)."""
    ids = input_ids.to(_device_of(text_encoder))
    output = text_encoder(ids, output_hidden_states=True, return_dict=True)
    return output["hidden_states"][-2], output["last_hidden_state"]


def pooled_rows(
    text_encoder: nn.Module, last_hidden_state: torch.Tensor, input_ids: torch.Tensor, eos_id: int
) -> torch.Tensor:
    """The state at each row's first end token (position 0 without one), projected: (B, L, D) -> (B, P).

    transformers takes the position of the highest id instead, which fails with words of textual inversion.
    """
    positions = (input_ids == eos_id).int().argmax(dim=-1).to(last_hidden_state.device)
    states = last_hidden_state[torch.arange(len(positions), device=positions.device), positions]
    project = projection_of(text_encoder)
    assert project is not None
    return project(states.to(project.weight.dtype)).to(last_hidden_state.dtype)


def encode_rows(text_encoder: nn.Module, input_ids: torch.Tensor, clip_skip: int | None = None) -> torch.Tensor:
    """Token ids (B, L) -> hidden states (B, L, D).

    Args:
        clip_skip: k takes the k-th state from the end, then the final layer norm; None and 1 take the last.
    """
    input_ids = input_ids.to(_device_of(text_encoder))
    if clip_skip is None or clip_skip == 1:
        return text_encoder(input_ids)[0]
    if clip_skip < 1:
        raise UserError(f"clip_skip {clip_skip} is below 1", "use 1 for the last layer, 2 for the one before it")
    states = text_encoder(input_ids, output_hidden_states=True, return_dict=True)["hidden_states"]
    if clip_skip >= len(states):
        raise UserError(
            f"clip_skip {clip_skip} is too large: the text encoder has {len(states) - 1} layers", "use a smaller value"
        )
    return transformer_of(text_encoder).final_layer_norm(states[-clip_skip])


def _device_of(text_encoder: nn.Module) -> torch.device:
    weight = next(text_encoder.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def join_chunks(hidden: torch.Tensor, chunks: int) -> torch.Tensor:
    """States of chunks (B n, 77, D) -> (B, 75 n + 2, D): first row, 75 rows of each chunk, last row."""
    hidden = hidden.reshape(-1, chunks * CHUNK, hidden.shape[-1])
    inner = hidden.reshape(hidden.shape[0], chunks, CHUNK, -1)[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, :1], inner, hidden[:, -1:]], dim=1)


def encode_chunks(
    text_encoder: nn.Module,
    input_ids: torch.Tensor,
    *,
    clip_skip: int | None = None,
    max_token_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Token ids -> the context of an SD 1.x or 2.x U-Net.

    Args:
        input_ids: int64 (B, n, 77); or (B, L) without chunks (`--no_token_padding`).
        clip_skip: see `encode_rows`.
        max_token_length: None, or 150 or 225: chunks are joined to 75 n + 2 rows.
        dtype: of the result; None leaves it.

    Returns:
        (B, 77, D), (B, 152, D), (B, 227, D); (B, L, D) for ids without chunks.
    """
    chunked = input_ids.shape[-1] == CHUNK
    rows = input_ids.reshape(-1, input_ids.shape[-1])
    hidden = encode_rows(text_encoder, rows, clip_skip)
    if chunked and max_token_length is not None:
        hidden = join_chunks(hidden, count_chunks(max_token_length))
    elif chunked and input_ids.ndim == 3:
        hidden = hidden.reshape(input_ids.shape[0], -1, hidden.shape[-1])
    return hidden if dtype is None else hidden.to(dtype)


def encode_with_pooled(
    text_encoder: nn.Module,
    input_ids: torch.Tensor,
    *,
    eos_id: int,
    max_token_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids (B, n, 77) -> the states that SDXL takes, and the pooled text.

    Args:
        eos_id: the end token.
        max_token_length: see `encode_chunks`.
        dtype: of the hidden states; None leaves it. The pooled text keeps the encoder's.

    Returns:
        Penultimate hidden states without final norm (shapes of `encode_chunks`), and the pooled text (B, P) of each
        caption's first chunk; None for an encoder without projection.
    """
    rows = input_ids.reshape(-1, input_ids.shape[-1])
    hidden, last = penultimate_rows(text_encoder, rows)
    pooled = None
    if projection_of(text_encoder) is not None:
        chunks = len(rows) // len(input_ids)
        pooled = pooled_rows(text_encoder, last[::chunks], rows[::chunks], eos_id)
    if max_token_length is not None:
        hidden = join_chunks(hidden, count_chunks(max_token_length))
    else:
        hidden = hidden.reshape(len(input_ids), -1, hidden.shape[-1])
    return (hidden if dtype is None else hidden.to(dtype)), pooled


def weighted_rows(
    tokens: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    *,
    max_chunks: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with weights -> ids (B, n, 77) and weights (B, 77 n), n chosen by the longest caption.

    Args:
        tokens: per caption, without begin and end.
        weights: one per token.
        max_chunks: longest allowed; what goes beyond 75 tokens each is cut.
    """
    limit = 75 * max_chunks
    longest = min(max((len(row) for row in tokens), default=0), limit)
    chunks = max(1, min(max_chunks, (longest - 1) // 75 + 1))
    rows = torch.full((len(tokens), 75 * chunks + 2), eos_id, dtype=torch.int64)
    scale = torch.ones(len(tokens), chunks, CHUNK)
    for b, (ids, factors) in enumerate(zip(tokens, weights, strict=True)):
        count = min(len(ids), limit)
        rows[b, 0] = bos_id
        rows[b, 1 : 1 + count] = torch.tensor(ids[:count], dtype=torch.int64)
        padded = torch.ones(75 * chunks)
        padded[:count] = torch.tensor(factors[:count])
        scale[b, :, 1:-1] = padded.view(chunks, 75)
    if chunks == 1:
        return rows[:, None], scale.flatten(1)
    split = torch.from_numpy(split_chunks(rows.numpy(), pad_id=pad_id, eos_id=eos_id))
    return split, scale.flatten(1)


def apply_weights(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scale hidden states (B, L, D) by weights (B, L) and bring each caption back to its mean before."""
    before = hidden.float().mean(dim=(1, 2)).to(hidden.dtype)
    hidden = hidden * weights.to(hidden)[..., None]
    after = hidden.float().mean(dim=(1, 2)).to(hidden.dtype)
    return hidden * (before / after)[:, None, None]
