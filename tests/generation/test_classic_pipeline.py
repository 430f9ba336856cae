"""The pipeline and the sampling functions under their old names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.diffusion.samplers import make_sampler
from library.lpw_stable_diffusion import StableDiffusionLongPromptWeightingPipeline, get_weighted_text_embeddings
from library.messages import UserError
from library.models.family import LoadedModel, family
from library.train_util import line_to_prompt_dict, load_prompts, sample_images


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> LoadedModel:
    return family("sd").load(tiny_sd15)


@pytest.fixture
def pipe(model: LoadedModel) -> StableDiffusionLongPromptWeightingPipeline:
    return StableDiffusionLongPromptWeightingPipeline(
        model.vae,
        model.text_encoders[0],
        model.tokenizers[0],
        model.unet,
        make_sampler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_draws_what_was_recorded(pipe: StableDiffusionLongPromptWeightingPipeline, reference: Path) -> None:
    recorded = load_file(reference / "generation" / "sd15_ddim" / "tensors.safetensors")
    torch.manual_seed(7)
    latents = pipe.to("cpu")(
        prompt="a red circle on a green field",
        negative_prompt="blurry",
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=4,
    )
    expected = recorded["final_latents"]
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    pictures = pipe.latents_to_image(latents)
    assert [picture.size for picture in pictures] == [(64, 64)]
    states, negatives = get_weighted_text_embeddings(pipe, "a red circle on a green field", "blurry")
    torch.testing.assert_close(torch.cat([negatives, states]), recorded["context"], rtol=0, atol=1e-4)


def test_several_pictures_and_callbacks(pipe: StableDiffusionLongPromptWeightingPipeline) -> None:
    steps: list[int] = []
    latents = pipe.text2img(
        ["a", "b"],
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=1,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        callback=lambda index, timestep, current: steps.append(index),
        callback_steps=2,
        is_cancelled_callback=lambda: len(steps) == 2,
    )
    assert latents.shape == (4, 4, 8, 8)
    assert steps == [0, 2]


def test_refuses_what_it_cannot_do(pipe: StableDiffusionLongPromptWeightingPipeline) -> None:
    with pytest.raises(UserError, match="image to image"):
        pipe("a", image=Image.new("RGB", (64, 64)))
    with pytest.raises(UserError, match="ControlNet"):
        pipe("a", controlnet=object())
    with pytest.raises(UserError, match="2 negative prompts for 1"):
        pipe("a", negative_prompt=["b", "c"])


def test_sample_images(model: LoadedModel, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zqx --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    args = argparse.Namespace(
        sample_every_n_epochs=None,
        sample_every_n_steps=5,
        sample_prompts=str(prompts),
        sample_sampler="euler",
        v_parameterization=False,
        output_dir=str(tmp_path),
        output_name="name",
        clip_skip=None,
        seed=None,
    )
    accelerator = SimpleNamespace(is_main_process=True, mixed_precision="no", unwrap_model=lambda module: module)
    parts = (model.vae, model.tokenizers[0], model.text_encoders[0], model.unet)
    sample_images(accelerator, args, None, 4, "cpu", *parts)
    assert not (tmp_path / "sample").exists()
    sample_images(accelerator, args, None, 5, "cpu", *parts, ("zqx", "red circle"))
    (picture,) = (tmp_path / "sample").iterdir()
    assert picture.name.startswith("name_")
    assert picture.name.endswith("_000005_00_3.png")
    with Image.open(picture) as image:
        assert image.text["prompt"] == "a red circle"
    assert load_prompts(str(prompts))[0]["sample_steps"] == 2


def test_sliced_vae_under_its_old_name() -> None:
    from library.slicing_vae import SlicingAutoencoderKL

    torch.manual_seed(0)
    vae = SlicingAutoencoderKL(block_out_channels=(32,), num_slices=3)
    images = vae.decode(torch.randn(1, 4, 8, 8)).sample
    assert images.shape == (1, 3, 8, 8)


def test_recorded_prompt_lines(golden: Path) -> None:
    """The original reads a prompt that looks like an option (`s 5`) as one; here the prompt stays a prompt."""
    cured = {"s 5 --l a": {"prompt": "s 5"}}
    cases = json.loads((golden / "training_later.json").read_text(encoding="utf-8"))["prompt_lines"]
    assert {case["line"] for case in cases} > cured.keys()
    for case in cases:
        assert line_to_prompt_dict(case["line"]) == cured.get(case["line"], case["result"])
