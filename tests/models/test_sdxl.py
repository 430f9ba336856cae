"""The family SDXL: opening, refusing, saving, and what diffusers makes of our files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.messages import UserError
from library.models import sdxl_saving
from library.models.family import TextCondition, family
from library.models.key_maps import SDXL_OPENCLIP_PREFIX, UNET_PREFIX
from library.models.sd import StableDiffusion
from library.models.sdxl import StableDiffusionXL
from library.models.sdxl_loading import LOGIT_SCALE
from library.models.tokenizers import input_ids
from tests.models.test_sd import dtype_of, same_tensors

FAMILY = StableDiffusionXL()
CAPTIONS = ["a photo of a cat", "red square"]  # without the padding token of the folder's second tokenizer, `!`
SIZES = {
    "original_sizes_hw": torch.tensor([[640, 512], [300, 400]]),
    "crop_top_lefts": torch.tensor([[0, 16], [8, 0]]),
    "target_sizes_hw": torch.tensor([[64, 96], [64, 96]]),
}
PROJECTION = SDXL_OPENCLIP_PREFIX + "text_projection"


@pytest.fixture(scope="module", params=["ruled", "tiny"])
def opened(request, ruled_model, tiny_sdxl):
    """(path, model): the golden small model and that of the recorded runs."""
    path = tiny_sdxl if request.param == "tiny" else ruled_model("sdxl")
    return path, FAMILY.load(path)


def encoded(model) -> TextCondition:
    ids = [input_ids(tokenizer, CAPTIONS) for tokenizer in model.tokenizers]
    return FAMILY.encode_text(model.text_encoders, ids, tokenizers=model.tokenizers)


@torch.no_grad()
def prediction(model) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    return FAMILY.predict(model.unet, latents, torch.tensor([3, 500]), encoded(model), SIZES)


def test_registered():
    assert isinstance(family("sdxl"), StableDiffusionXL)
    assert FAMILY.version(False, True) == "sdxl_base_v1-0"


@torch.no_grad()
def test_text_of_a_caption(opened):
    _, model = opened
    tokenizers = FAMILY.load_tokenizers()
    assert [t.pad_token_id for t in tokenizers] == [49407, 0]
    assert [t.bos_token_id for t in tokenizers] == [49406, 49406]
    ids = [input_ids(tokenizer, CAPTIONS, 150) for tokenizer in tokenizers]
    options = {"tokenizers": tokenizers, "max_token_length": 150, "dtype": torch.bfloat16}
    text = FAMILY.encode_text(model.text_encoders, ids, **options)
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    assert [tuple(h.shape) for h in text.hidden] == [(2, 152, width) for width in widths]
    assert {h.dtype for h in text.hidden} == {torch.bfloat16} and text.pooled.dtype == torch.float32
    assert text.pooled.shape == (2, model.text_encoders[1].config.projection_dim)
    # Clip skip has no effect, and the pooled text is that of the first chunk.
    again = FAMILY.encode_text(model.text_encoders, ids, clip_skip=2, **options)
    assert all(a.equal(b) for a, b in zip(again.hidden, text.hidden, strict=True))
    torch.testing.assert_close(encoded(model).pooled, text.pooled)


@torch.no_grad()
def test_every_size_counts(opened):
    _, model = opened
    latents, steps, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), encoded(model)
    plain = FAMILY.predict(model.unet, latents, steps, text, SIZES)
    for name in SIZES:
        other = FAMILY.predict(model.unet, latents, steps, text, SIZES | {name: SIZES[name] + 100})
        assert not torch.allclose(other, plain, atol=1e-4), name


def test_file_round_trip_is_exact(opened, tmp_path):
    path, model = opened
    FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True, dtype=dtype_of(path))
    same_tensors(path, tmp_path / "a.safetensors")


def test_file_to_folder_to_file(opened, tmp_path):
    """Every tensor comes back bit for bit; the scale beside the second encoder, which folders lack, is ln 100."""
    path, model = opened
    FAMILY.save(model, tmp_path / "folder", stability_layout=False)
    again = FAMILY.load(tmp_path / "folder")
    assert (again.is_stability_layout, again.version) == (False, "sdxl_base_v1-0")
    assert (again.extras["logit_scale"], again.extras["ckpt_info"]) == (None, None)
    assert again.unet.config == model.unet.config
    assert prediction(again).equal(prediction(model))
    FAMILY.save(again, tmp_path / "b.safetensors", stability_layout=True, dtype=dtype_of(path))
    first, second = load_file(path), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert {k for k in first if not first[k].equal(second[k])} <= {LOGIT_SCALE}
    assert second[LOGIT_SCALE].item() == pytest.approx(4.6052, abs=1e-3)


def test_folder_in_half_and_as_bin(opened, tmp_path):
    _, model = opened
    FAMILY.save(model, tmp_path / "bin", stability_layout=False, safetensors=False, dtype=torch.float16)
    names = {str(p.relative_to(tmp_path / "bin")) for p in (tmp_path / "bin").rglob("*") if p.is_file()}
    assert {f"text_encoder{n}/pytorch_model.bin" for n in ("", "_2")} <= names
    again = FAMILY.load(tmp_path / "bin", dtype=torch.bfloat16)
    assert {p.dtype for p in again.unet.parameters()} == {torch.bfloat16}
    assert model.text_encoders[0].dtype == torch.float32  # what is written is a copy
    config = json.loads((tmp_path / "bin" / "vae" / "config.json").read_text())
    assert (config["scaling_factor"], config["force_upcast"]) == (0.13025, True)


def test_pickle_counts_on(opened, tmp_path):
    _, model = opened
    assert model.extras["ckpt_info"] is None
    FAMILY.save(model, tmp_path / "a.ckpt", stability_layout=True, safetensors=False, epoch=2, step=30)
    again = FAMILY.load(tmp_path / "a.ckpt")
    assert again.extras["ckpt_info"] == (2, 30)
    FAMILY.save(again, tmp_path / "b.ckpt", stability_layout=True, safetensors=False, epoch=1, step=7)
    second = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert (second["epoch"], second["global_step"]) == (3, 37)
    assert prediction(FAMILY.load(tmp_path / "b.ckpt")).equal(prediction(model))


def test_projection_as_the_weight_of_a_linear_layer(tiny_sdxl, tmp_path):
    """Some merged files hold it under another name and not transposed."""
    state = load_file(tiny_sdxl)
    state[PROJECTION + ".weight"] = state.pop(PROJECTION).T.contiguous()
    save_file(state, tmp_path / "a.safetensors")
    assert prediction(FAMILY.load(tmp_path / "a.safetensors")).equal(prediction(FAMILY.load(tiny_sdxl)))


def test_another_vae_and_dtype(tiny_sdxl, ruled_model):
    own = FAMILY.load(ruled_model("sdxl"))
    model = FAMILY.load(tiny_sdxl, vae=ruled_model("sdxl"), dtype=torch.float16)
    assert all(v.half().equal(model.vae.state_dict()[k]) for k, v in own.vae.state_dict().items())
    assert model.vae.config.scaling_factor == 0.13025
    modules = (model.unet, model.vae, *model.text_encoders)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float16}


# What a model says of its own prediction.


def test_marks_of_v_prediction(tiny_sdxl, tmp_path, caplog):
    model = FAMILY.load(tiny_sdxl, v_parameterization=True, zero_terminal_snr=True)
    FAMILY.save(model, tmp_path / "v.safetensors", stability_layout=True, dtype=torch.float16)
    written = load_file(tmp_path / "v.safetensors")
    assert written["v_pred"].numel() == written["ztsnr"].numel() == 0
    caplog.clear()
    again = FAMILY.load(tmp_path / "v.safetensors", v_parameterization=True)
    assert not caplog.text
    assert (again.extras["told_prediction_type"], again.extras["zero_terminal_snr"]) == ("v_prediction", True)
    FAMILY.save(again, tmp_path / "v2.safetensors", stability_layout=True, dtype=torch.float16)
    same_tensors(tmp_path / "v.safetensors", tmp_path / "v2.safetensors")
    FAMILY.save(again, tmp_path / "folder", stability_layout=False)
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert FAMILY.load(tmp_path / "folder", v_parameterization=True).extras["zero_terminal_snr"] is True


@pytest.mark.parametrize("kind", ["marks", "metadata", "folder"])
def test_contradictions_are_said(tiny_sdxl, tmp_path, caplog, kind):
    model = FAMILY.load(tiny_sdxl, v_parameterization=True, zero_terminal_snr=True)
    path = tmp_path / "v.safetensors"
    if kind == "folder":
        path = tmp_path / "v"
        FAMILY.save(model, path, stability_layout=False)
    elif kind == "metadata":
        save_file(load_file(tiny_sdxl), path, {"modelspec.prediction_type": "v"})
    else:
        FAMILY.save(model, path, stability_layout=True)
    caplog.clear()
    plain = FAMILY.load(path, zero_terminal_snr=False)
    assert "give --v_parameterization" in caplog.text
    assert ("give --zero_terminal_snr" in caplog.text) == (kind != "metadata")
    FAMILY.save(plain, tmp_path / "e.safetensors", stability_layout=True)
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "e.safetensors").keys()
    assert FAMILY.load(path, v_parameterization=None).prediction_type == "v_prediction"
    caplog.clear()
    save_file(load_file(tiny_sdxl), tmp_path / "e2.safetensors", {"modelspec.prediction_type": "epsilon"})
    FAMILY.load(tmp_path / "e2.safetensors", v_parameterization=True)
    assert "leave out --v_parameterization" in caplog.text


# What diffusers makes of our files.


@torch.no_grad()
def diffusers_outputs(pipe, model) -> None:
    """Text, sizes, U-Net and VAE of the pipeline agree with ours."""
    hidden, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")
    text = encoded(model)
    torch.testing.assert_close(torch.cat(text.hidden, dim=-1), hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-5, rtol=1e-5)
    ids = pipe._get_add_time_ids((640, 512), (0, 16), (64, 96), torch.float32, pooled.shape[-1])
    assert ids[0].tolist() == [v for name in SIZES for v in SIZES[name][0].tolist()]
    latents, steps = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 800])
    rows = torch.cat(list(SIZES.values()), dim=1)
    conditions = {"text_embeds": pooled, "time_ids": rows}
    theirs = pipe.unet(latents, steps, encoder_hidden_states=hidden, added_cond_kwargs=conditions).sample
    ours = FAMILY.predict(model.unet, latents, steps, text, SIZES)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipe.vae.decode(latents).sample, model.vae.decode(latents).sample, atol=1e-5, rtol=1e-5)
    assert pipe.vae.config.scaling_factor == FAMILY.latent_scale


def test_diffusers_opens_our_folder(opened, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "folder"
    FAMILY.save(opened[1], folder, stability_layout=False)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), local_files_only=True)
    diffusers_outputs(pipe, opened[1])
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_diffusers_opens_our_file(ruled_model, tmp_path, suffix):
    """With text encoders of different widths: diffusers tells them apart by that."""
    from diffusers import StableDiffusionXLPipeline

    model = FAMILY.load(ruled_model("sdxl"))
    path, folder = tmp_path / f"model.{suffix}", tmp_path / "folder"
    FAMILY.save(model, folder, stability_layout=False)
    FAMILY.save(model, path, stability_layout=True, safetensors=suffix == "safetensors")
    pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    diffusers_outputs(pipe, model)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "300KB"}, {"safe_serialization": False}])
def test_we_open_a_folder_that_diffusers_wrote(tiny_sdxl, tmp_path, options):
    from diffusers import StableDiffusionXLPipeline

    model = FAMILY.load(tiny_sdxl)
    FAMILY.save(model, tmp_path / "ours", stability_layout=False)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "ours"), local_files_only=True)
    pipe.save_pretrained(tmp_path / "theirs", **options)
    if "max_shard_size" in options:
        assert list((tmp_path / "theirs" / "unet").glob("*-of-*"))
    assert prediction(FAMILY.load(tmp_path / "theirs")).equal(prediction(model))


def test_diffusers_draws_what_we_predict(tiny_sdxl, tmp_path):
    """A whole picture: the pipeline's latents equal those of the same schedule over our parts."""
    from diffusers import StableDiffusionXLPipeline

    model = FAMILY.load(tiny_sdxl)
    FAMILY.save(model, tmp_path / "m", stability_layout=False)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "m"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "latents": start.clone(), "output_type": "latent"}
    theirs = pipe("red square", height=64, width=64, **options).images
    text = TextCondition([h[1:] for h in encoded(model).hidden], encoded(model).pooled[1:])
    sizes = {name: torch.tensor([[0, 0] if name == "crop_top_lefts" else [64, 64]]) for name in SIZES}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(3)
    latents = start * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = FAMILY.predict(model.unet, scheduler.scale_model_input(latents, t), t[None], text, sizes)
            latents = scheduler.step(output, t, latents).prev_sample
    torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=1e-4)


# Bad input: one line that names the thing.


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as error:
        FAMILY.load(source, **options)
    assert "\n" not in str(error.value) and error.value.remedy
    return f"{error.value} {error.value.remedy}"


def test_other_families_are_named(tiny_sd15, tiny_sd21, tiny_sdxl, tmp_path):
    assert "Stable Diffusion 1.x" in refusal(tiny_sd15) and "without sdxl_" in refusal(tiny_sd15)
    assert "Stable Diffusion 2.x" in refusal(tiny_sd21)
    sd = StableDiffusion()
    sd.save(sd.load(tiny_sd15), tmp_path / "one", stability_layout=False)
    assert "Stable Diffusion 1.x" in refusal(tmp_path / "one")
    save_file({"conditioner.embedders.0.model.x": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    assert "the SDXL refiner" in refusal(tmp_path / "refiner.safetensors")
    state = load_file(tiny_sdxl)
    for keys in (("edm_mean", "edm_std"), ("edm_vpred.sigma_max",)):
        save_file(state | {key: torch.zeros(1) for key in keys}, tmp_path / "edm.safetensors")
        assert "EDM model" in refusal(tmp_path / "edm.safetensors")


def test_incomplete_files_are_described(tiny_sdxl, tmp_path):
    state = load_file(tiny_sdxl)
    path = tmp_path / "bad.safetensors"
    cases = {
        UNET_PREFIX + "middle_block.0.in_layers.2.weight": "the U-Net lacks",
        SDXL_OPENCLIP_PREFIX + "ln_final.weight": "the second text encoder lacks",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "the first text encoder lacks",
        PROJECTION: "text_projection",
        UNET_PREFIX + "label_emb.0.0.weight": "label_emb",
    }
    for key, words in cases.items():
        save_file({k: v for k, v in state.items() if k != key}, path)
        assert words in refusal(path) and str(path) in refusal(path), key
    save_file(state | {SDXL_OPENCLIP_PREFIX + "foo.weight": torch.zeros(1)}, path)
    assert "the second text encoder does not know" in refusal(path)
    save_file(state | {f"{UNET_PREFIX}foo.{i}": torch.zeros(1) for i in range(30)}, path)
    assert "and 20 more" in refusal(path) and len(refusal(path)) < 1000
    path.write_bytes(Path(tiny_sdxl).read_bytes()[:-1000])
    assert "truncated" in refusal(path)
    bad = {k: v.clone() for k, v in state.items()}
    bad[UNET_PREFIX + "out.2.bias"][1] = float("nan")
    save_file(bad, path)
    assert f"non-finite values in {UNET_PREFIX}out.2.bias" in refusal(path)


def test_bad_folders(tiny_sdxl, tmp_path):
    FAMILY.save(FAMILY.load(tiny_sdxl), tmp_path / "m", stability_layout=False)
    shutil.rmtree(tmp_path / "m" / "text_encoder_2")
    assert "no subfolder text_encoder_2" in refusal(tmp_path / "m")
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    assert "inpainting model" in refusal(tmp_path / "m")


def test_what_a_single_file_cannot_say_is_refused(tiny_sdxl, tmp_path):
    from dataclasses import replace

    from library.models.unet_sdxl import from_config

    model = FAMILY.load(tiny_sdxl)
    model.unet = from_config(replace(model.unet.config, norm_num_groups=16))
    with pytest.raises(UserError, match="U-Net norm groups 16"):
        FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True)
    model.vae = None
    with pytest.raises(UserError, match="VAE is missing"):
        sdxl_saving.save_stability(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
