"""LoRA files for diffusers pipelines, SD 1.x, 2.x and SDXL: apply, take off, merge, restore; docs/networks.md.

Stands alone: copied beside another program it needs torch only (the demonstration at its end also this project).
"""

from __future__ import annotations

import bisect
import sys
from pathlib import Path

if __name__ == "__main__":  # the command line is read before torch is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from library.options.parser import parse

    ARGUMENTS = parse("networks/lora_diffusers.py")

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX_UNET = "lora_unet"
UNET_TARGETS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_TARGETS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
LINEAR_CLASSES = ("Linear", "LoRACompatibleLinear")
CONV_CLASSES = ("Conv2d", "LoRACompatibleConv")
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def make_unet_conversion_map() -> dict[str, str]:
    """Names of SDXL U-Net modules: Stability's -> diffusers', with underscores."""
    table = {
        "input_blocks_0_0": "conv_in",
        "out_0": "conv_norm_out",
        "out_2": "conv_out",
        "middle_block_1": "mid_block_attentions_0",
    }

    def resnet(theirs: str, ours: str) -> None:
        table.update({f"{theirs}_{a}": f"{ours}_{b}" for a, b in _RESNET.items()})

    for level in range(3):
        for j in range(2):
            resnet(f"input_blocks_{3 * level + j + 1}_0", f"down_blocks_{level}_resnets_{j}")
            table[f"input_blocks_{3 * level + j + 1}_1"] = f"down_blocks_{level}_attentions_{j}"
        for j in range(3):
            resnet(f"output_blocks_{3 * level + j}_0", f"up_blocks_{level}_resnets_{j}")
            table[f"output_blocks_{3 * level + j}_1"] = f"up_blocks_{level}_attentions_{j}"
        table[f"input_blocks_{3 * (level + 1)}_0_op"] = f"down_blocks_{level}_downsamplers_0_conv"
        table[f"output_blocks_{3 * level + 2}_2"] = f"up_blocks_{level}_upsamplers_0"
    for j in range(2):
        resnet(f"middle_block_{2 * j}", f"mid_block_resnets_{j}")
        table[f"time_embed_{2 * j}"] = f"time_embedding_linear_{j + 1}"
        table[f"label_emb_0_{2 * j}"] = f"add_embedding_linear_{j + 1}"
    return table


UNET_CONVERSION_MAP = make_unet_conversion_map()
_SORTED_NAMES = sorted(UNET_CONVERSION_MAP)


def convert_unet_names(weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy whose U-Net keys have diffusers names, if they had Stability's.

    Raises:
        AssertionError: some of the names are of the one kind, some of the other.
    """
    result, converted, unet = {}, 0, 0
    for key, value in weights_sd.items():
        if key.startswith(f"{PREFIX_UNET}_"):
            unet += 1
            name = key[len(PREFIX_UNET) + 1 :]
            place = bisect.bisect_right(_SORTED_NAMES, name.partition(".")[0]) - 1
            theirs = _SORTED_NAMES[place]
            if name.startswith(theirs):
                key = f"{PREFIX_UNET}_{UNET_CONVERSION_MAP[theirs]}{name[len(theirs) :]}"
                converted += 1
        result[key] = value
    assert converted in (0, unet), f"{converted} of {unet} U-Net names are Stability's, the others are not"
    return result


class LoRAModule(nn.Module):
    """A low-rank update on one layer, which it can join and leave."""

    def __init__(
        self, lora_name: str, org_module: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: Any = 1
    ) -> None:
        super().__init__()
        self.lora_name, self.lora_dim, self.multiplier = lora_name, lora_dim, multiplier
        self.is_conv = type(org_module).__name__ in CONV_CLASSES
        if self.is_conv:
            shape = (org_module.kernel_size, org_module.stride, org_module.padding)
            self.lora_down: nn.Module = nn.Conv2d(org_module.in_channels, lora_dim, *shape, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(lora_dim, org_module.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(org_module.in_features, lora_dim, bias=False)
            self.lora_up = nn.Linear(lora_dim, org_module.out_features, bias=False)
        alpha = float(alpha) or float(lora_dim)
        self.scale = alpha / lora_dim
        self.register_buffer("alpha", torch.tensor(alpha))
        nn.init.zeros_(self.lora_up.weight)
        self.org_module = [org_module]  # in a list, where it is no part of this module's state
        self.org_forward: Any = None

    def apply_to(self, multiplier: float | None = None) -> None:
        """Take over the layer's forward."""
        if multiplier is not None:
            self.multiplier = multiplier
        if self.org_forward is None:
            self.org_forward = self.org_module[0].forward
            self.org_module[0].forward = self.forward

    def unapply_to(self) -> None:
        """Give the layer its forward back."""
        if self.org_forward is not None:
            self.org_module[0].forward = self.org_forward
            self.org_forward = None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """The layer with its update; `scale` is what some releases of diffusers pass, without effect."""
        down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        if self.is_conv:
            hidden = F.conv2d(F.conv2d(x, down, None, self.lora_down.stride, self.lora_down.padding), up)
        else:
            hidden = F.linear(F.linear(x, down), up)
        return self.org_forward(x) + hidden * (self.multiplier * self.scale)

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """The update in the shape of the layer's weight, float32."""
        multiplier = self.multiplier if multiplier is None else multiplier
        down, up = self.lora_down.weight.detach().float(), self.lora_up.weight.detach().float()
        update = up.flatten(1) @ down.flatten(1)
        return update.view(self.org_module[0].weight.shape) * (multiplier * self.scale)

    def merge_to(self, multiplier: float | None = None) -> None:
        """Add the update to the layer's weight."""
        self._add(self.get_weight(multiplier))

    def restore_from(self, multiplier: float | None = None) -> None:
        """Subtract what `merge_to` added."""
        self._add(-self.get_weight(multiplier))

    @torch.no_grad()
    def _add(self, update: Tensor) -> None:
        weight = self.org_module[0].weight
        weight.copy_(weight.float() + update.to(weight.device))


class LoRANetwork(nn.Module):
    """The updates of a pipeline's U-Net and text encoders."""

    def __init__(
        self,
        text_encoder: Any,
        unet: nn.Module,
        multiplier: float = 1.0,
        modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, Any] | None = None,
        varbose: bool = False,
    ) -> None:
        """
        Args:
            text_encoder: one model or a list.
            modules_dim, modules_alpha: rank and alpha by module name; layers that they lack get no module.

        Raises:
            AssertionError: a name belongs to no layer.
        """
        super().__init__()
        self.multiplier = multiplier
        dims, alphas = dict(modules_dim or {}), dict(modules_alpha or {})
        encoders = list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]
        prefixes = ["lora_te"] if len(encoders) == 1 else [f"lora_te{i + 1}" for i in range(len(encoders))]
        self.text_encoder_loras: list[LoRAModule] = []
        for prefix, encoder in zip(prefixes, encoders, strict=True):
            self.text_encoder_loras += self._make(prefix, encoder, TEXT_TARGETS, dims, alphas)
        self.unet_loras = self._make(PREFIX_UNET, unet, UNET_TARGETS, dims, alphas)
        unknown = dims.keys() - {lora.lora_name for lora in self.loras}
        assert not unknown, f"{len(unknown)} modules of the file have no layer here: {sorted(unknown)[:5]}"
        for lora in self.loras:
            self.add_module(lora.lora_name, lora)

    @property
    def loras(self) -> list[LoRAModule]:
        """Every module, text encoders first."""
        return [*self.text_encoder_loras, *self.unet_loras]

    def _make(
        self, prefix: str, root: nn.Module, targets: tuple[str, ...], dims: Mapping[str, int], alphas: Mapping[str, Any]
    ) -> list[LoRAModule]:
        return [
            LoRAModule(name, layer, self.multiplier, dims[name], alphas.get(name, dims[name]))
            for name, layer in _layers(prefix, root, targets)
            if name in dims
        ]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a file's tensors, under either kind of names; 1x1 convolutions and matrices fit each other."""
        weights = convert_unet_names(state_dict)
        for key, own in self.state_dict().items():
            if key in weights and weights[key].shape != own.shape:
                weights[key] = weights[key].view(own.shape)
        for lora in self.loras:  # a file without alpha means the rank
            weights.setdefault(f"{lora.lora_name}.alpha", lora.alpha)
        return super().load_state_dict(weights, strict=strict, assign=assign)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of every module."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    def apply_to(self, multiplier: float = 1.0, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Take over the layers' forwards."""
        parts = [(apply_text_encoder, self.text_encoder_loras), (apply_unet, self.unet_loras)]
        for lora in (lora for wanted, loras in parts if wanted for lora in loras):
            lora.apply_to(multiplier)

    def unapply_to(self) -> None:
        """Give all layers their forwards back."""
        for lora in self.loras:
            lora.unapply_to()

    def merge_to(self, multiplier: float = 1.0) -> None:
        """Add all updates to the layers' weights."""
        for lora in self.loras:
            lora.merge_to(multiplier)

    def restore_from(self, multiplier: float = 1.0) -> None:
        """Subtract what `merge_to` with the same multiplier added."""
        for lora in self.loras:
            lora.restore_from(multiplier)


def _layers(prefix: str, root: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """(name in files, layer) of every linear layer and convolution in modules of these classes."""
    for path, module in root.named_modules():
        if type(module).__name__ not in targets:
            continue
        if targets is TEXT_TARGETS and not path.startswith("text_model"):
            path = f"text_model.{path}"  # recent releases of transformers lack the level
        for relative, layer in module.named_modules():
            if type(layer).__name__ in (*LINEAR_CLASSES, *CONV_CLASSES):
                yield ".".join(filter(None, (prefix, path, relative))).replace(".", "_"), layer


def create_network_from_weights(
    text_encoder: Any, unet: nn.Module, weights_sd: Mapping[str, Tensor], multiplier: float = 1.0
) -> LoRANetwork:
    """A network with the ranks and alphas of a file; its values are loaded by `load_state_dict`.

    Args:
        text_encoder: one model or a list.
    """
    dims, alphas = {}, {}
    for key, value in convert_unet_names(weights_sd).items():
        name, _, rest = key.partition(".")
        if "alpha" in rest:
            alphas[name] = value
        elif "lora_down" in rest:
            dims[name] = value.shape[0]
    return LoRANetwork(text_encoder, unet, multiplier, modules_dim=dims, modules_alpha=alphas)


def merge_lora_weights(pipe: Any, weights_sd: Mapping[str, Tensor], multiplier: float = 1.0) -> None:
    """Merge a file's tensors into a pipeline for good."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else pipe.text_encoder
    network = create_network_from_weights(encoders, pipe.unet, weights_sd, multiplier)
    network.load_state_dict(weights_sd)
    network.merge_to(multiplier)


def setup_parser() -> Any:
    """The parser of the demonstration."""
    from library.options.parser import build_parser

    return build_parser("networks/lora_diffusers.py")


def main(args: Any) -> None:
    """Draw one picture without the network and with it in every way: `lora_diffusers_NAME.png`."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors.torch import load_file

    from library.messages import log
    from library.options.parser import resolve
    from library.runtime.devices import pick_device

    demo = resolve(args, "networks/lora_diffusers.py").network_demo
    device = pick_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    pipeline_class = StableDiffusionXLPipeline if demo.sdxl else StableDiffusionPipeline
    pipe = pipeline_class.from_pretrained(demo.model_id, torch_dtype=dtype).to(device)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if demo.sdxl else pipe.text_encoder
    weights = load_file(demo.lora_weights)
    network = create_network_from_weights(encoders, pipe.unet, weights)
    network.load_state_dict(weights)
    network.to(device, dtype)

    def draw(name: str) -> None:
        generator = torch.Generator(device).manual_seed(demo.seed)
        result = pipe(demo.prompt, negative_prompt=demo.negative_prompt, generator=generator)
        result.images[0].save(f"lora_diffusers_{name}.png")
        log.info("saved lora_diffusers_%s.png", name)

    draw("original")
    for name, change in (
        ("applied", network.apply_to),
        ("unapplied", network.unapply_to),
        ("merged", network.merge_to),
        ("restored", network.restore_from),
    ):
        change()
        draw(name)


if __name__ == "__main__":
    from library.messages import run

    run(lambda: main(ARGUMENTS))
