"""Which tensor of a Stability file is which tensor of our modules: tables of prefix rewrites, used both ways.

A rule matches a key that equals its prefix or goes on with a dot; the longest match wins; the rest is kept.
From the keys of a module, `entries_*` make the list of file tensors that hold them, with the transform between the
two. Reading and writing use the same list, so they are exact inverses.

Layouts: "Stability" is one file with the names of Stability AI's code; "diffusers" are our module names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Rules = Sequence[tuple[str, str]]
Transform = Literal["identity", "linear_to_conv1x1", "conv1x1_to_linear", "concat_rows", "transpose"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPENCLIP_PREFIX = "conditioner.embedders.1.model."


class PrefixMap:
    """Rules (Stability prefix, diffusers prefix), applied in either direction."""

    def __init__(self, rules: Rules) -> None:
        self.rules = tuple(rules)
        self._to_diffusers = dict(self.rules)
        self._to_stability = {ours: theirs for theirs, ours in self.rules}
        if len(self._to_stability) != len(self.rules) or len(self._to_diffusers) != len(self.rules):
            raise ValueError("two rules share a prefix")

    def to_diffusers(self, key: str) -> str | None:
        """Our name of a Stability key, None when no rule matches."""
        return _rewrite(key, self._to_diffusers)

    def to_stability(self, key: str) -> str | None:
        """The Stability name of one of our keys, None when no rule matches."""
        return _rewrite(key, self._to_stability)


def _rewrite(key: str, table: Mapping[str, str]) -> str | None:
    prefix = key
    while prefix not in table:
        cut = prefix.rfind(".")
        if cut < 0:
            return None
        prefix = prefix[:cut]
    return table[prefix] + key[len(prefix) :]


_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)


def _resnet(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.{a}", f"{ours}.{b}") for a, b in _RESNET]


def encoder_half_rules(attention_levels: Iterable[int], levels: int, layers: int = 2) -> list[tuple[str, str]]:
    """Time embedding, down levels and middle block: what a U-Net and its ControlNet have in common.

    Args:
        attention_levels: indices of the down levels that have attention.
        levels: number of levels.
        layers: resnets per down level.
    """
    attention = set(attention_levels)
    rules = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.1", "mid_block.attentions.0"),
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]
    stride = layers + 1
    for i in range(levels):
        for j in range(layers):
            block = f"input_blocks.{stride * i + j + 1}"
            rules += _resnet(f"{block}.0", f"down_blocks.{i}.resnets.{j}")
            if i in attention:
                rules.append((f"{block}.1", f"down_blocks.{i}.attentions.{j}"))
        if i < levels - 1:
            rules.append((f"input_blocks.{stride * (i + 1)}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
    return rules


def unet_rules(attention_levels: Iterable[int], levels: int, layers: int = 2) -> list[tuple[str, str]]:
    """A whole U-Net: the encoder half, the up levels and the output layers."""
    attention = set(attention_levels)
    rules = encoder_half_rules(attention, levels, layers)
    rules += [("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    stride = layers + 1
    for i in range(levels):
        attends = levels - 1 - i in attention
        for j in range(stride):
            block = f"output_blocks.{stride * i + j}"
            rules += _resnet(f"{block}.0", f"up_blocks.{i}.resnets.{j}")
            if attends:
                rules.append((f"{block}.1", f"up_blocks.{i}.attentions.{j}"))
        if i < levels - 1:
            last = f"output_blocks.{stride * i + stride - 1}"
            rules.append((f"{last}.{2 if attends else 1}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    return rules


def sd_unet_map(levels: int = 4) -> PrefixMap:
    """The U-Net of SD 1.x and 2.x: attention on every level but the deepest."""
    return PrefixMap(unet_rules(range(levels - 1), levels))


def sdxl_unet_map(attention_levels: Iterable[int] = (1, 2), levels: int = 3, layers: int = 2) -> PrefixMap:
    """The U-Net of SDXL: our names are those of Stability, so this leads to a diffusers folder only."""
    sizes = [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    return PrefixMap(unet_rules(attention_levels, levels, layers) + sizes)


# VAE attention in current and in old diffusers names.
_VAE_ATTENTION = (
    ("q", ("to_q", "query")),
    ("k", ("to_k", "key")),
    ("v", ("to_v", "value")),
    ("proj_out", ("to_out.0", "proj_attn")),
)


def vae_map(levels: int = 4, layers: int = 2, *, old_attention_names: bool = False) -> PrefixMap:
    """diffusers' AutoencoderKL, every family.

    Args:
        levels: number of levels.
        layers: resnets per encoder level (the decoder has one more).
        old_attention_names: the attention names of diffusers before 0.17.
    """
    rules = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [
            (f"{side}.conv_in", f"{side}.conv_in"),
            (f"{side}.conv_out", f"{side}.conv_out"),
            (f"{side}.norm_out", f"{side}.conv_norm_out"),
            (f"{side}.mid.attn_1.norm", f"{side}.mid_block.attentions.0.group_norm"),
        ]
        for j in range(2):
            rules += _vae_resnet(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        for theirs, ours in _VAE_ATTENTION:
            name = ours[1 if old_attention_names else 0]
            rules.append((f"{side}.mid.attn_1.{theirs}", f"{side}.mid_block.attentions.0.{name}"))
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            rules += _vae_resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(layers + 1):
            rules += _vae_resnet(f"decoder.up.{up}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        if i < levels - 1:
            rules.append((f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"))
            rules.append((f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{i}.upsamplers.0.conv"))
    return PrefixMap(rules)


def _vae_resnet(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(theirs, ours), (f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")]


def modern_vae_key(key: str) -> str:
    """A diffusers VAE key with the attention names of today."""
    for _, (new, old) in _VAE_ATTENTION:
        key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return key


_OPENCLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)


def openclip_map(layers: int) -> PrefixMap:
    """OpenCLIP text encoder without the joined q, k, v and the projection, which are no plain renames."""
    rules = [
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(layers):
        block, layer = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        rules += [(f"{block}.{a}", f"{layer}.{b}") for a, b in _OPENCLIP_LAYER]
    return PrefixMap(rules)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file and the tensors of our module that it holds.

    Attributes:
        file_key: name in the file.
        module_keys: our names; several when the file holds their rows one below the other.
        transform: from module to file.
    """

    file_key: str
    module_keys: tuple[str, ...]
    transform: Transform = "identity"

    def to_file(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensors -> the tensor of the file."""
        if self.transform == "concat_rows":
            return torch.cat(list(tensors))
        return _TO_FILE[self.transform](tensors[0])

    def to_module(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensor of the file -> (our name, tensor). Files that already have our form are taken as they are."""
        if self.transform == "concat_rows":
            # copies: parts of one memory could not be trained apart
            yield from zip(self.module_keys, (part.clone() for part in tensor.chunk(3)), strict=True)
        else:
            yield self.module_keys[0], _TO_MODULE[self.transform](tensor)

    def file_shape(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Shape in the file, from the shapes of our tensors."""
        return tuple(self.to_file([torch.empty(tuple(s), device="meta") for s in shapes]).shape)


def _as_conv(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _as_linear(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_TO_FILE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": _same,
    "linear_to_conv1x1": _as_conv,
    "conv1x1_to_linear": _as_linear,
    "transpose": lambda tensor: tensor.T.contiguous(),
}
_TO_MODULE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": _same,
    "linear_to_conv1x1": _as_linear,
    "conv1x1_to_linear": _as_conv,
    "transpose": lambda tensor: tensor.T.contiguous(),
}


def _must(key: str, mapped: str | None) -> str:
    if mapped is None:
        raise KeyError(f"no rule for {key}")
    return mapped


def unet_entries(
    shapes: Mapping[str, Sequence[int]], key_map: PrefixMap, *, linear_projections: bool, prefix: str = UNET_PREFIX
) -> list[Entry]:
    """File tensors of a U-Net.

    Args:
        shapes: our keys and shapes.
        key_map: of the family.
        linear_projections: the file holds `proj_in`, `proj_out` as matrices (SD 2.x), else as 1x1 convolutions.
        prefix: in front of every file key.
    """
    entries = []
    for key, shape in shapes.items():
        transform: Transform = "identity"
        if key.endswith((".proj_in.weight", ".proj_out.weight")) and (len(shape) == 2) != linear_projections:
            transform = "conv1x1_to_linear" if linear_projections else "linear_to_conv1x1"
        entries.append(Entry(prefix + _must(key, key_map.to_stability(key)), (key,), transform))
    return entries


def vae_entries(
    shapes: Mapping[str, Sequence[int]], *, levels: int, layers: int = 2, prefix: str = VAE_PREFIX
) -> list[Entry]:
    """File tensors of a VAE; the attention is matrices inside and 1x1 convolutions in the file."""
    old = any(".attentions.0.query." in key for key in shapes)
    key_map = vae_map(levels, layers, old_attention_names=old)
    attention = {f"{side}.mid.attn_1.{name}.weight" for side in ("encoder", "decoder") for name, _ in _VAE_ATTENTION}
    entries = []
    for key in shapes:
        theirs = _must(key, key_map.to_stability(key))
        entries.append(Entry(prefix + theirs, (key,), "linear_to_conv1x1" if theirs in attention else "identity"))
    return entries


def own_entries(shapes: Mapping[str, Sequence[int]], *, prefix: str) -> list[Entry]:
    """File tensors of a module whose names are those in the file (the U-Net of SDXL)."""
    return [Entry(prefix + key, (key,)) for key in shapes]


def clip_entries(shapes: Mapping[str, Sequence[int]], *, prefix: str = CLIP_PREFIX) -> list[Entry]:
    """File tensors of a text encoder that keeps transformers' names (SD 1.x, SDXL's first)."""
    return own_entries(shapes, prefix=prefix)


def openclip_entries(shapes: Mapping[str, Sequence[int]], *, layers: int, prefix: str = OPENCLIP_PREFIX) -> list[Entry]:
    """File tensors of a text encoder in OpenCLIP layout (SD 2.x, SDXL's second): q, k, v in one tensor."""
    key_map = openclip_map(layers)
    entries = []
    for key in shapes:
        if key == "text_projection.weight":
            entries.append(Entry(prefix + "text_projection", (key,), "transpose"))
        elif ".self_attn." in key and ".out_proj." not in key:
            head, _, tail = key.rpartition(".self_attn.")
            name, kind = tail.split(".")
            if name == "q_proj":
                layer = head.rpartition(".")[2]
                parts = tuple(f"{head}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
                theirs = f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"
                entries.append(Entry(theirs, parts, "concat_rows"))
        else:
            entries.append(Entry(prefix + _must(key, key_map.to_stability(key)), (key,)))
    return entries
