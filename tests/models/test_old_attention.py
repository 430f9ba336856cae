"""The U-Net's and attention's old names do what they did."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding as theirs

from library import attention_processors, device_utils, original_unet, train_util
from library.models.unet_sd import UNet2DConditionModel


def test_every_entry_resolves() -> None:
    for porch in (attention_processors, device_utils, original_unet):
        for name in porch.NAMES:
            assert getattr(porch, name) is not None, name
    assert original_unet.UNet2DConditionModel is train_util.UNet2DConditionModel is UNet2DConditionModel
    assert device_utils.get_preferred_device().type in ("cuda", "xpu", "mps", "cpu")


def test_flash_attention_function_masks() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    mask = torch.arange(10).expand(2, 10) < torch.tensor([[4], [10]])
    lower = torch.ones(10, 10, dtype=torch.bool).tril()
    scores = (q @ k.mT / 8**0.5).masked_fill(~(mask[:, None, None] & lower), float("-inf"))
    out = original_unet.FlashAttentionFunction.apply(q, k, v, mask, True, 512, 1024)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


def test_processor_serves_diffusers_attention() -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8)
    x, context = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    expected = layer(x, context)
    processor = attention_processors.FlashAttnProcessor()
    torch.testing.assert_close(processor(layer, x, context), expected)

    class Doubled:
        def forward(self, x, context):
            return context, 2 * context

    layer.hypernetwork = Doubled()
    bias = layer.to_out[0].bias
    torch.testing.assert_close(processor(layer, x, context) - bias, 2 * (expected - bias))


def test_timestep_embedding_in_all_forms() -> None:
    t = torch.tensor([0.0, 37.5, 999.0])
    for width in (8, 5):
        for flip in (False, True):
            for shift, scale in ((1, 1), (0, 2.5)):
                form = {"flip_sin_to_cos": flip, "downscale_freq_shift": shift, "scale": scale, "max_period": 5000}
                ours = original_unet.get_timestep_embedding(t, width, **form)
                torch.testing.assert_close(ours, theirs(t, width, **form))
