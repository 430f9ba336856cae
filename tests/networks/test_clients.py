"""Programs beside this one: LyCORIS as network module, diffusers as reader of our files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.models.family import family
from networks import lora
from tests.networks.network_models import predict, randomize, small_text_encoder, small_unet

pytest.importorskip("peft")
pytest.importorskip("lycoris")


@pytest.mark.parametrize(
    "arguments", [{}, {"algo": "loha", "conv_dim": "4", "conv_alpha": "1"}, {"algo": "lokr", "factor": "4"}]
)
def test_lycoris_as_network_module(tmp_path: Path, arguments: dict[str, str]) -> None:
    """The calls of a training script in their order, then the file loaded again and merged."""
    module = importlib.import_module("lycoris.kohya")
    text_encoder, unet = small_text_encoder(), small_unet()
    network = module.create_network(
        1.0, 4, 1.0, None, text_encoder, unet, neuron_dropout=None, dropout=None, **arguments
    )
    network.apply_to(text_encoder, unet, True, True)
    before = predict(unet).detach()
    groups, names = network.prepare_optimizer_params(1e-4, 1e-2, 1e-3)
    assert names == ["textencoder", "unet"]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    network.prepare_grad_etc(text_encoder, unet)
    network.on_epoch_start(text_encoder, unet)
    for _ in range(2):
        predict(unet).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = predict(unet).detach()
    assert (trained - before).abs().max() > 1e-3

    file = tmp_path / "lycoris.safetensors"
    network.save_weights(str(file), torch.float32, {"ss_network_module": "lycoris.kohya"})
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in load_file(file))
    merges = (False, True) if not arguments else (False,)  # LyCORIS merges its other methods to other weights
    for merge in merges:
        text_encoder, unet = small_text_encoder(), small_unet()
        again, weights = module.create_network_from_weights(
            1.0, str(file), None, text_encoder, unet, for_inference=True
        )
        if merge:
            again.merge_to(text_encoder, unet, weights, torch.float32, "cpu")
        else:
            again.apply_to(text_encoder, unet, True, True)
            again.load_state_dict(weights, False)
        with torch.no_grad():
            torch.testing.assert_close(predict(unet), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "conv_alpha": "1.5"}])
def test_diffusers_loads_our_files(tmp_path: Path, tiny_sd15: Path, arguments: dict[str, str]) -> None:
    """A pipeline built from local parts gives our outputs with our file, text encoder included."""
    from diffusers import StableDiffusionPipeline

    sd = family("sd")
    model = sd.load(tiny_sd15)
    sd.save(model, tmp_path / "model", stability_layout=False)
    text_encoder, unet = model.text_encoders[0].eval(), model.unet.eval()
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **arguments)
    network.apply_to(text_encoder, unet, True, True)
    randomize(network, 0.1)
    file = tmp_path / "ours.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": "networks.lora"})

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None, local_files_only=True)
    ids = torch.arange(77)[None] * 7
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        ours_text = text_encoder(ids)[0]
        ours = unet(latents, time, ours_text).sample
        plain = pipeline.unet(latents, time, ours_text).sample
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        theirs_text = pipeline.text_encoder(ids)[0]
        theirs = pipeline.unet(latents, time, theirs_text).sample
    assert (plain - ours).abs().max() > 1e-2
    torch.testing.assert_close(theirs_text, ours_text, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
