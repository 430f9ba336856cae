"""Regional use of networks in generation: each network works inside its mask and on its own sub-prompt.

Rows of a batch of B pictures with P sub-prompts: text encoders see B*P texts (or B negative ones), cross-attention
keys and values B negative rows, then P rows per picture, then B rows of a third guidance branch if there is one;
everything else B negative rows, B rows, (B rows). Formulas: networks.md 2.9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import AdapterNetwork

MASK_LEVELS = 4


class RegionalNetwork(AdapterNetwork):
    """A network that can be confined to a region.

    Attributes:
        sub_prompt_index: which sub-prompt is this network's; None when not regional.
        is_last_network: this network's modules run first (they wrap those of the others).
        mask: (H, W) or (1, H, W) in 0..1.
        mask_dic: mask by area of the feature map, each (1, 1, h, w).
        shared: one dictionary per batch, common to all networks.
    """

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.sub_prompt_index: int | None = None
        self.is_last_network = False
        self.mask: Tensor | None = None
        self.mask_dic: dict[int, Tensor] = {}
        self.batch_size = 1
        self.num_sub_prompts = 1
        self.shared: dict[str, Any] = {}

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """Confine the network to a mask; a mask without a white pixel counts as all white."""
        self.mask = mask if mask.max() > 0 else torch.ones_like(mask)
        self.sub_prompt_index = sub_prompt_index
        self.is_last_network = is_last_network
        for adapter in self.adapters:
            adapter.set_network(self)

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[str, Any],
        ds_ratio: float | None = None,
    ) -> None:
        """Prepare the masks of every level of the U-Net for pictures of `width` x `height` pixels.

        Args:
            ds_ratio: deep shrink also meets every level at this share of its size.
        """
        self.batch_size, self.num_sub_prompts, self.shared = batch_size, num_sub_prompts, shared
        self.mask_dic = {}
        assert self.mask is not None, "set_region comes first"
        like = self.adapters[0].lora_down.weight
        mask = self.mask.float().reshape(1, 1, *self.mask.shape[-2:])

        def add(h: int, w: int) -> None:
            level = F.interpolate(mask, (h, w), mode="bilinear", align_corners=False)
            self.mask_dic[h * w] = level.to(like.device, like.dtype)

        h, w = height // 8, width // 8
        for _ in range(MASK_LEVELS):
            add(h, w)
            if h % 2 or w % 2:
                add(h + h % 2, w + w % 2)
            if ds_ratio is not None:
                add(max(1, int(h * ds_ratio)), max(1, int(w * ds_ratio)))
            h, w = (h + 1) // 2, (w + 1) // 2

    def mask_for(self, x: Tensor) -> Tensor:
        """The mask that fits a tensor (rows, C, h, w), (rows, area, C) or (rows, C); 1/P where no size is known."""
        area = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]
        mask = self.mask_dic.get(area) if x.dim() > 2 else None
        if mask is None:
            return torch.full((1,) * x.dim(), 1 / self.num_sub_prompts, dtype=x.dtype, device=x.device)
        return mask if x.dim() == 4 else mask.view(1, -1, 1)


class RegionalModule(nn.Module):
    """Mixin of an adapter module (`lora_name`, `org_forward`, `low_rank_output`) that follows its network's region."""

    lora_name: str
    network: RegionalNetwork | None
    org_forward: Any
    low_rank_output: Any

    def set_network(self, network: RegionalNetwork) -> None:
        """Follow the regions of a network."""
        object.__setattr__(self, "network", network)  # the network is the parent: not to be registered as a child
        name = self.lora_name
        self.is_text_encoder = name.startswith("lora_te")
        self.takes_sub_prompt = self.is_text_encoder or "attn2_to_k" in name or "attn2_to_v" in name
        self.is_regional = not self.takes_sub_prompt and "time_emb" not in name and "emb_layers" not in name

    def regional_forward(self, x: Tensor) -> Tensor:
        """Forward of a module whose network has a region and which is not one of the plain ones."""
        network = self.network
        assert network is not None
        if self.takes_sub_prompt:
            return self._sub_prompt_forward(network, x)
        if "attn2_to_out" in self.lora_name:
            return self._to_out_forward(network, x)
        update = self.low_rank_output(x)
        y = self.org_forward(x) + update * network.mask_for(update)
        if "attn2_to_q" in self.lora_name and network.is_last_network:
            y = _repeat_for_sub_prompts(y, network.batch_size, network.num_sub_prompts)
        return y

    def _sub_prompt_forward(self, network: RegionalNetwork, x: Tensor) -> Tensor:
        """Only the rows of this network's sub-prompt get the update."""
        batch, prompts = network.batch_size, network.num_sub_prompts
        if x.shape[0] == batch:
            return self.org_forward(x)
        first = 0 if self.is_text_encoder else batch
        assert network.sub_prompt_index is not None, "set with the region"
        rows = slice(first + network.sub_prompt_index, first + batch * prompts, prompts)
        update = self.low_rank_output(x[rows])
        y = self.org_forward(x)
        y[rows] += update
        return y

    def _to_out_forward(self, network: RegionalNetwork, x: Tensor) -> Tensor:
        """Join the sub-prompts' rows by the masks; the last network's module, which runs first, does it."""
        batch, prompts, own = network.batch_size, network.num_sub_prompts, network.sub_prompt_index
        assert own is not None, "set with the region"
        update = self.low_rank_output(x[batch + own : batch + batch * prompts : prompts])
        if network.is_last_network:
            network.shared[self.lora_name] = {}
        entries = network.shared[self.lora_name]
        entries[own] = (update, network.mask_for(update))
        y = self.org_forward(x)
        if not network.is_last_network:
            return y

        zeros = torch.zeros_like(entries[own][1])
        masks = [entries[p][1] if p in entries else zeros for p in range(prompts)]
        mask_sum = torch.stack(masks).sum(0) + 1e-4
        cond = y[batch : batch + batch * prompts].unflatten(0, (batch, prompts))
        joined = sum(cond[:, p] * masks[p] for p in range(prompts)) / mask_sum
        joined = joined + sum(update * mask for update, mask in entries.values())
        return torch.cat([y[:batch], joined, y[batch + batch * prompts :]])


def _repeat_for_sub_prompts(y: Tensor, batch: int, prompts: int) -> Tensor:
    """B negative rows, each row P times, and the B rows of a third branch where there are 3B."""
    return torch.cat([y[:batch], y[batch : 2 * batch].repeat_interleave(prompts, 0), y[2 * batch :]])
