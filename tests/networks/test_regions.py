"""Networks confined to regions, against the recorded run of the original with two networks and a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from library.models.family import family
from networks import lora
from tests.networks.network_models import predict, randomize, small_unet


def regional_network(unet: torch.nn.Module, index: int, is_last: bool, mask: torch.Tensor) -> lora.LoRANetwork:
    network = lora.LoRANetwork([], unet, module_class=lora.LoRAInfModule)
    network.apply_to([], unet, True, True)
    randomize(network)
    network.set_region(index, is_last, mask)
    return network


def test_recorded_run(tiny_sd15: Path, reference: Path) -> None:
    """Text and U-Net outputs of every step, fed with the recorded inputs."""
    folder = reference / "generation"
    recorded = load_file(folder / "sd15_regional" / "tensors.safetensors")
    file = folder / "data" / "lora_a_sd15.safetensors"
    model = family("sd").load(tiny_sd15)
    text_encoder, unet = model.text_encoders[0].eval(), model.unet.eval()
    masks = torch.from_numpy(np.array(Image.open(folder / "data" / "regions.png").convert("RGB"))).float() / 255
    assert masks.shape == (64, 64, 3)

    networks = []
    for index, multiplier in enumerate((0.8, 0.5)):
        network, weights = lora.create_network_from_weights(
            multiplier, str(file), None, text_encoder, unet, for_inference=True
        )
        network.apply_to(text_encoder, unet)
        network.load_state_dict(weights, strict=False)
        network.set_region(index, index == 1, masks[..., index])
        networks.append(network.eval())
    shared: dict = {}
    for network in networks:
        network.set_current_generation(1, 2, 64, 64, shared)

    with torch.no_grad():
        prompts = text_encoder(recorded["tokens.0"])[0]
        torch.testing.assert_close(prompts, recorded["context"][1:], atol=2e-5, rtol=0)
        for step, time in enumerate(recorded["timesteps"]):
            latents = recorded["model_input"][step].repeat(2, 1, 1, 1)
            output = unet(latents, time, recorded["context"]).sample
            expected = recorded["model_output"][step]
            assert (output - expected).abs().max() <= 1e-5 * expected.abs().max(), step


def test_an_empty_mask_counts_as_full() -> None:
    network = regional_network(small_unet(), 0, True, torch.zeros(64, 64))
    assert network.mask.min() == 1


def test_masks_for_odd_sizes_and_deep_shrink() -> None:
    network = regional_network(small_unet(), 0, True, torch.ones(72, 56))
    network.set_current_generation(1, 1, 56, 72, {}, ds_ratio=0.5)
    sizes = {tuple(mask.shape[-2:]) for mask in network.mask_dic.values()}
    assert {(9, 7), (10, 8), (5, 4), (3, 2), (2, 1), (4, 3)} <= sizes


def test_a_third_guidance_branch_stays_without_the_network() -> None:
    """Rows: negative, two sub-prompts, third branch; the update reaches the sub-prompts' rows alone."""
    plain, unet = small_unet(), small_unet()
    networks = [regional_network(unet, index, index == 1, torch.ones(64, 64)) for index in range(2)]
    for network in networks:
        network.set_current_generation(1, 2, 64, 64, {})
    keys = [m for m in networks[0].unet_loras if "attn2_to_k" in m.lora_name]
    context = torch.randn(4, 7, 32)
    layer, reference = keys[0].org_module_ref[0], dict(plain.named_modules())
    name = next(path for path, module in unet.named_modules() if module is layer)
    difference = (layer(context) - reference[name](context)).abs().amax((1, 2))
    assert difference[0] == 0 and difference[3] == 0
    assert difference[1] > 0 and difference[2] > 0


def test_one_region_over_everything_is_the_plain_network_on_the_prompt_rows() -> None:
    """A full mask and one sub-prompt: prompt rows as without regions; 1e-4 is in the formula's denominator."""
    regional, plain = small_unet(), small_unet()
    network = regional_network(regional, 0, True, torch.ones(64, 64))
    network.set_current_generation(1, 1, 64, 64, {})
    other = lora.LoRANetwork([], plain)
    other.apply_to([], plain, True, True)
    randomize(other)
    with torch.no_grad():
        torch.testing.assert_close(predict(regional)[1], predict(plain)[1], atol=1e-3, rtol=1e-3)
