"""Pictures of the tiny SDXL model: guidance forms, sizes, number formats, the scripts, samples while training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdxl_gen_img
import sdxl_minimal_inference
from library.diffusion.samplers import make_sampler
from library.generation import engine as engine_module
from library.generation import minimal
from library.generation.command import open_model
from library.generation.engine import Engine, pictures
from library.generation.request import ImageRequest, SizeCondition
from library.generation.sampling import SamplePrompt, draw_samples
from library.messages import UserError
from library.models.family import LoadedModel, family
from library.models.unet_sdxl import size_embeddings
from library.options.image_model import ImageModelConfig
from library.sdxl_lpw_stable_diffusion import SdxlStableDiffusionLongPromptWeightingPipeline
from library.sdxl_train_util import sample_images

FAMILY = family("sdxl")


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> LoadedModel:
    return FAMILY.load(tiny_sdxl)


def engine(model: LoadedModel, **options: Any) -> Engine:
    return Engine(FAMILY, model, **{"sampler": "euler_a", **options})


def request(**values: Any) -> ImageRequest:
    return ImageRequest(**{"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "scale": 4.0, "seed": 7, **values})


@pytest.fixture
def vectors(model: LoadedModel) -> Iterator[list[torch.Tensor]]:
    """The size vector y of every call of the U-Net."""
    seen: list[torch.Tensor] = []
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3].clone()))
    yield seen
    handle.remove()


@pytest.mark.parametrize("values", [{"scale": 1.0}, {"negative_scale": 2.0}], ids=["no guidance", "three parts"])
def test_guidance_forms_that_crashed_in_the_original(
    model: LoadedModel, vectors: list[torch.Tensor], values: dict
) -> None:
    """The third part has the negative side's sizes and the pooled text of the empty prompt."""
    sizes = SizeCondition(original_height=256, original_width_negative=96, crop_left=8)
    draw = engine(model)
    asked = request(negative_prompt="blurry", sizes=sizes, **values)
    assert torch.isfinite(draw.latents([asked])).all()
    own = size_embeddings(*(torch.tensor([pair]) for pair in ([256, 64], [0, 8], [64, 64])))
    other = size_embeddings(*(torch.tensor([pair]) for pair in ([256, 96], [0, 8], [64, 64])))
    rows = torch.cat([own] if "scale" in values else [other, own, other])
    torch.testing.assert_close(vectors[0][:, -1536:], rows)
    pooled = draw.encode([asked]).pooled
    torch.testing.assert_close(vectors[0][:, :-1536], pooled)
    if len(rows) == 3:
        empty = draw.encode([request(prompt="", scale=1.0)]).pooled
        torch.testing.assert_close(pooled[2:], empty, atol=1e-5, rtol=0)


def test_a_picture_does_not_depend_on_its_batch(model: LoadedModel) -> None:
    draw = engine(model)
    alone = draw.latents([request()])
    together = draw.latents([request(seed=8, prompt="a dog"), request()])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def test_sizes_are_part_of_the_batch_key_and_of_the_picture(model: LoadedModel) -> None:
    draw = engine(model)
    small = request(sizes=SizeCondition(original_height=16, original_width=16))
    assert draw.batch_key(request(sizes=SizeCondition())) != draw.batch_key(small)
    assert not torch.allclose(draw.latents([request(sizes=SizeCondition())]), draw.latents([small]))
    assert torch.equal(draw.latents([request(sizes=SizeCondition())]), draw.latents([request()]))


def test_sides_are_multiples_of_32(model: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"width 72 is not a multiple of 32.*use 64"):
        engine(model).generate([request(width=72)])


def test_long_prompts_pool_their_first_chunk(model: LoadedModel) -> None:
    draw = engine(model, max_chunks=3)
    long = draw.encode([request(prompt=" ".join(["cat"] * 80), scale=1.0)])
    short = draw.encode([request(prompt=" ".join(["cat"] * 75), scale=1.0)])
    assert long.hidden[1].shape[1] == 154
    torch.testing.assert_close(long.pooled, short.pooled)


def test_no_half_vae(tiny_sdxl: Path) -> None:
    opened = open_model(FAMILY, ImageModelConfig(ckpt=str(tiny_sdxl), bf16=True, no_half_vae=True), device="cpu",
                        dtype=torch.bfloat16)  # fmt: skip
    assert opened.vae.dtype == torch.float32 and opened.unet.dtype == torch.bfloat16
    exact = FAMILY.load(tiny_sdxl).vae.state_dict()
    assert all(torch.equal(value, exact[name]) for name, value in opened.vae.state_dict().items())
    image = engine(opened, dtype=torch.bfloat16).generate([request()])[0]
    assert image.size == (64, 64)


def test_a_model_that_says_it_predicts_velocity_is_drawn_so(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = tmp_path / "v.safetensors"
    save_file(load_file(tiny_sdxl) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, marked)
    opened = open_model(FAMILY, ImageModelConfig(ckpt=str(marked)), device="cpu", dtype=torch.float32)
    assert opened.prediction_type == "v_prediction"
    seen = []
    make = make_sampler
    monkeypatch.setattr("library.generation.passes.make_sampler", lambda *a, **k: seen.append(make(*a, **k)) or seen[0])
    engine(opened, sampler="ddim").latents([request()])
    assert seen[0].config.prediction_type == "v_prediction"
    assert seen[0].config.rescale_betas_zero_snr is True


def run(main: Any, module: Any, *arguments: object) -> None:
    main(module.setup_parser().parse_args([str(argument) for argument in arguments]))


def test_the_picture_script(tiny_sdxl: Path, tmp_path: Path) -> None:
    line = "a cat --n ugly --d 5 --oh 256 --nw 96 --ct 4 --cl 8"
    run(
        sdxl_gen_img.main, sdxl_gen_img, "--ckpt", tiny_sdxl, "--W", 64, "--H", 96, "--steps", 2, "--prompt", line,
        "--original_width", 320, "--crop_top", 16, "--outdir", tmp_path, "--bf16", "--no_half_vae",
    )  # fmt: skip
    (path,) = tmp_path.iterdir()
    with Image.open(path) as image:
        assert image.size == (64, 96)
        wanted = {"original-height": "256", "original-width": "320", "original-width-negative": "96", "crop-top": "4",
                  "crop-left": "8", "original-height-negative": "None"}  # fmt: skip
        assert image.text.items() >= wanted.items()


class TestMinimal:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(minimal, "STEPS", 2)
        monkeypatch.setattr(type(FAMILY), "default_size", 64)

    def test_draws(self, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path) -> None:
        drawn = []
        decode = engine_module.Engine.decode
        monkeypatch.setattr(engine_module.Engine, "decode", lambda self, x: drawn.append(x) or decode(self, x))
        lora = reference / "generation" / "data" / "lora_sdxl.safetensors"
        base = ("--ckpt_path", tiny_sdxl, "--output_dir", tmp_path)
        for more in ((), ("--prompt2", "a dog"), ("--lora_weights", f"{lora};0.5"), ("--negative_prompt", "ugly")):
            random.seed(1)
            run(sdxl_minimal_inference.main, sdxl_minimal_inference, *base, *more)
        assert len(list(tmp_path.glob("image_*_00?.png"))) == 4
        assert all(not torch.allclose(drawn[0], other) for other in drawn[1:])

    def test_is_the_picture_of_the_engine(self, model: LoadedModel, tmp_path: Path) -> None:
        draw = Engine(FAMILY, model, sampler="euler", noise_device="cpu")
        path = minimal.draw(draw, "a cat", None, "", 7, tmp_path)
        expected = draw.generate([request(scale=7.0)])[0]
        with Image.open(path) as image:
            assert image.tobytes() == expected.tobytes() and not image.text

    def test_brackets_are_text(self, model: LoadedModel) -> None:
        draw = Engine(FAMILY, model, sampler="euler")
        plain, marked = (minimal.encode(draw, text, text, "") for text in ("a cat", "(a cat:1.5)"))
        assert not torch.allclose(plain.hidden[0][1], marked.hidden[0][1])
        assert minimal.encode(draw, "x AND y", "x AND y", "").hidden[0].shape[:2] == (2, 77)

    def test_asks(self, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter(["a cat", "", "", "seven", "a cat", "a dog", "ugly", "7", ""])
        monkeypatch.setattr("builtins.input", lambda _: next(answers))
        run(
            sdxl_minimal_inference.main, sdxl_minimal_inference,
            "--ckpt_path", tiny_sdxl, "--output_dir", tmp_path, "--interactive",
        )  # fmt: skip
        assert len(list(tmp_path.iterdir())) == 1
        assert next(answers, None) is None

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--output_dir", "none_such"], "folder none_such not found"),
            (["--lora_weights", "a.safetensors;strong"], "'strong' is no number"),
            (["--lora_weights", "none_such.safetensors"], "none_such.safetensors not found"),
        ],
    )
    def test_refusals(self, tmp_path: Path, arguments: list[str], words: str) -> None:
        with pytest.raises(UserError, match=words):
            run(
                sdxl_minimal_inference.main, sdxl_minimal_inference,
                "--ckpt_path", "x", "--output_dir", tmp_path, *arguments,
            )  # fmt: skip


class TestSamples:
    def test_a_sample_is_the_picture_of_the_script(self, model: LoadedModel, tmp_path: Path) -> None:
        prompt = SamplePrompt(prompt="a (cat:1.2)", width=72, height=64, steps=2, seed=7)
        (drawn,) = draw_samples(FAMILY, model, [prompt], output_dir=tmp_path, sampler="ddim")
        draw = engine(model, sampler="ddim", max_chunks=3)
        expected = draw.generate([request(prompt="a (cat:1.2)", scale=7.5)])[0]
        with Image.open(drawn.path) as image:
            assert image.tobytes() == expected.tobytes()

    def test_default_size(self) -> None:
        assert SamplePrompt(prompt="a").size(FAMILY.default_size, FAMILY.size_multiple) == (1024, 1024)

    def test_old_function(self, model: LoadedModel, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a cat --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
        args = SimpleNamespace(
            sample_every_n_epochs=None, sample_every_n_steps=5, sample_prompts=str(prompts), sample_sampler="euler",
            v_parameterization=False, output_dir=str(tmp_path), output_name="name", clip_skip=None, seed=None,
        )  # fmt: skip
        accelerator = SimpleNamespace(is_main_process=True, mixed_precision="no", unwrap_model=lambda module: module)
        sample_images(accelerator, args, None, 5, "cpu", model.vae, model.tokenizers, model.text_encoders, model.unet)
        (picture,) = (tmp_path / "sample").iterdir()
        assert picture.name.startswith("name_") and picture.name.endswith("_000005_00_3.png")


def test_pipeline_draws_what_was_recorded(model: LoadedModel, reference: Path) -> None:
    recorded = load_file(reference / "generation" / "sdxl_ddim" / "tensors.safetensors")
    pipe = SdxlStableDiffusionLongPromptWeightingPipeline(
        model.vae, model.text_encoders, model.tokenizers, model.unet, make_sampler("ddim"), None, None, False
    )
    torch.manual_seed(7)
    latents = pipe(
        "a red circle on a green field", "blurry", height=64, width=64, num_inference_steps=6, guidance_scale=4
    )
    expected = recorded["final_latents"]
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert pipe.latents_to_image(latents)[0].size == (64, 64)
    assert pictures(engine(model).decode(latents))[0].tobytes() == pipe.latents_to_image(latents)[0].tobytes()


def test_draws_what_diffusers_draws(model: LoadedModel, tmp_path: Path) -> None:
    """A whole picture with guidance and sizes, from the same noise: text, vector, sampler and all."""
    from diffusers import StableDiffusionXLPipeline

    FAMILY.save(model, tmp_path / "m", stability_layout=False)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "m"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_sampler("ddim")
    sizes = SizeCondition(original_height=256, original_width=320, original_height_negative=96, crop_top=8)
    asked = request(negative_prompt="blurry", sizes=sizes, sampler="ddim", height=96, steps=3)
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(asked.seed))
    theirs = pipe(
        asked.prompt, negative_prompt="blurry", height=96, width=64, num_inference_steps=3, guidance_scale=4.0,
        latents=noise, original_size=(256, 320), crops_coords_top_left=(8, 0), target_size=(96, 64),
        negative_original_size=(96, 320), negative_crops_coords_top_left=(8, 0), negative_target_size=(96, 64),
        output_type="latent",
    ).images  # fmt: skip
    ours = engine(model).latents([asked])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
