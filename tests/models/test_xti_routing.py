"""Text states per cross-attention: every attention gets its own entry, and equal entries change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from library.messages import UserError
from library.models import unet_sd
from library.models.embedding_files import XTI_LAYERS
from library.models.layers import CrossAttention

SMALL = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 64}
LAYERS = len(XTI_LAYERS)


@pytest.fixture
def hijack() -> ModuleType:
    import XTI_hijack

    return XTI_hijack


def unet() -> unet_sd.UNet2DConditionModel:
    torch.manual_seed(0)
    return unet_sd.UNet2DConditionModel(**SMALL).eval()


def layered_states(batch: int = 2) -> torch.Tensor:
    return torch.randn(LAYERS, batch, 5, 64, generator=torch.Generator().manual_seed(1))


def test_routing_of_the_original(golden: Path) -> None:
    recorded = json.loads((golden / "embeddings_xti_routing.json").read_text(encoding="utf-8"))["routing"]
    model, states, seen = unet(), layered_states(), {}
    for name, module in model.named_modules():
        if isinstance(module, CrossAttention) and name.endswith("attn2"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.update(
                    {name: next(a for a in (*args, *kwargs.values()) if torch.is_tensor(a) and a.shape[1] == 5)}
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(torch.randn(2, 4, 16, 16), 5, states)
    found = {name: next(i for i in range(LAYERS) if torch.equal(states[i], s)) for name, s in seen.items()}
    assert found == recorded


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_equal_entries_change_nothing(size: tuple[int, int]) -> None:
    """Also where sides do not halve evenly."""
    model, states = unet(), layered_states()[0]
    inputs = torch.randn(2, 4, *size), torch.tensor([5, 900])
    with torch.no_grad():
        plain = model(*inputs, states).sample
        layered = model(*inputs, states.expand(LAYERS, -1, -1, -1)).sample
        other = model(*inputs, layered_states()).sample
    assert torch.equal(layered, plain)
    assert not torch.allclose(other, plain, atol=1e-4)


def test_every_entry_gets_a_gradient_with_and_without_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, states = unet(), layered_states().requires_grad_()
        if checkpointing:
            model.train().enable_gradient_checkpointing()
        sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        model(sample, 5, states).sample.square().mean().backward()
        gradients.append(states.grad)
        assert all(entry.abs().max() > 0 for entry in states.grad)
    torch.testing.assert_close(*gradients)


def test_residuals_are_taken_too() -> None:
    """ControlNets work together with text states per layer."""
    model, states, sample = unet(), layered_states(1), torch.randn(1, 4, 8, 8)
    mid = torch.ones(1, 64, 1, 1)
    with torch.no_grad():
        assert not torch.allclose(
            model(sample, 5, states, mid_block_additional_residual=mid).sample, model(sample, 5, states).sample
        )


def test_a_wrong_number_of_layers_is_named() -> None:
    with pytest.raises(UserError, match="states for 12 layers, but this U-Net has 16"):
        unet()(torch.randn(1, 4, 8, 8), 5, layered_states(1)[:12])


def test_old_functions_stand_in_for_the_forwards(hijack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As third parties use them: assigned to the classes of the old module."""
    from library import original_unet

    inputs = torch.randn(1, 4, 10, 14, generator=torch.Generator().manual_seed(2)), 5, layered_states(1)
    with torch.no_grad():
        expected = unet()(*inputs).sample
        monkeypatch.setattr(original_unet.UNet2DConditionModel, "forward", hijack.unet_forward_XTI)
        monkeypatch.setattr(original_unet.CrossAttnDownBlock2D, "forward", hijack.downblock_forward_XTI)
        monkeypatch.setattr(original_unet.CrossAttnUpBlock2D, "forward", hijack.upblock_forward_XTI)
        assert torch.equal(unet()(*inputs).sample, expected)
        assert torch.equal(unet()(*inputs, return_dict=False)[0], expected)
