"""The family SD 1.x/2.x: opening, refusing, saving, and what diffusers makes of our files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.messages import UserError
from library.models.checkpoint import read_metadata
from library.models.family import TextCondition, family
from library.models.hashes import safetensors_data_hash_of
from library.models.sd import StableDiffusion
from library.models.tokenizers import input_ids

FAMILY = StableDiffusion()
CAPTIONS = ["a photo of a cat!", "red square"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "tiny1", "tiny2"])
def opened(request, ruled_model, tiny_sd15, tiny_sd21):
    """(path, v2, model): the golden small models and those of the recorded runs."""
    v2 = request.param.endswith("2")
    path = {"tiny1": tiny_sd15, "tiny2": tiny_sd21}.get(request.param) or ruled_model(request.param)
    return path, v2, FAMILY.load(path, v2=v2, v_parameterization=v2)


@torch.no_grad()
def prediction(model) -> torch.Tensor:
    width = model.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 12, 8, generator=generator)
    text = TextCondition([torch.randn(2, 77, width, generator=generator)])
    return FAMILY.predict(model.unet, latents, torch.tensor([3, 500]), text, {})


def same_tensors(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert not [k for k in first if first[k].dtype != second[k].dtype or not first[k].equal(second[k])]


def dtype_of(path: Path) -> torch.dtype:
    return next(v for v in load_file(path).values() if v.is_floating_point()).dtype


def test_registered():
    assert isinstance(family("sd"), StableDiffusion)
    versions = [FAMILY.version(v2, v) for v2 in (False, True) for v in (False, True)]
    assert versions == ["sd_v1", "sd_v1_v", "sd_v2", "sd_v2_v"]


def test_text_of_a_caption(opened):
    _, v2, model = opened
    tokenizers = FAMILY.load_tokenizers(v2, None, None)
    ids = input_ids(tokenizers[0], CAPTIONS, 150)
    text = FAMILY.encode_text(
        model.text_encoders, [ids], tokenizers=tokenizers, clip_skip=2, max_token_length=150, dtype=torch.bfloat16
    )
    assert text.hidden[0].shape == (2, 152, model.unet.config.cross_attention_dim)
    assert text.hidden[0].dtype == torch.bfloat16 and text.pooled is None


def test_file_round_trip_is_exact(opened, tmp_path):
    path, _, model = opened
    FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True, dtype=dtype_of(path))
    same_tensors(path, tmp_path / "a.safetensors")


def test_file_to_folder_to_file(opened, tmp_path):
    """Everything but the tensors that no part uses comes back bit for bit; those are made anew (SD 2.x)."""
    path, v2, model = opened
    FAMILY.save(model, tmp_path / "folder", stability_layout=False)
    again = FAMILY.load(tmp_path / "folder", v2=v2, v_parameterization=v2)
    assert (again.is_stability_layout, again.version) == (False, model.version)
    assert prediction(again).equal(prediction(model))
    FAMILY.save(again, tmp_path / "b.safetensors", stability_layout=True, dtype=dtype_of(path))
    first, second = load_file(path), load_file(tmp_path / "b.safetensors")
    unused = f"resblocks.{model.text_encoders[0].config.num_hidden_layers}."
    assert first.keys() == second.keys()
    changed = {k for k in first if not first[k].equal(second[k])}
    assert all(unused in k or k.endswith(("text_projection", "logit_scale")) for k in changed)
    assert v2 or not changed


def test_folder_to_folder_in_half_and_as_bin(opened, tmp_path):
    _, v2, model = opened
    FAMILY.save(model, tmp_path / "bin", stability_layout=False, safetensors=False, dtype=torch.float16)
    names = {str(p.relative_to(tmp_path / "bin")) for p in (tmp_path / "bin").rglob("*") if p.is_file()}
    assert {"unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model_index.json"} <= names
    again = FAMILY.load(tmp_path / "bin", v2=v2, v_parameterization=v2)
    assert again.unet.dtype == torch.float32  # the result does not depend on the file's precision
    FAMILY.save(again, tmp_path / "st", stability_layout=False, dtype=torch.float16)
    state = load_file(tmp_path / "st" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(v.dtype == torch.float16 for v in state.values())
    assert all(v.equal(model.unet.state_dict()[k].half()) for k, v in state.items())


def test_pickle_round_trip_counts_on(opened, tmp_path):
    _, v2, model = opened
    FAMILY.save(model, tmp_path / "a.ckpt", stability_layout=True, safetensors=False, epoch=2, step=30)
    again = FAMILY.load(tmp_path / "a.ckpt", v2=v2, v_parameterization=v2)
    FAMILY.save(again, tmp_path / "b.ckpt", stability_layout=True, safetensors=False, epoch=1, step=7)
    first = torch.load(tmp_path / "a.ckpt", weights_only=True)
    second = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert (second["epoch"], second["global_step"]) == (3, 37)
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(v.equal(second["state_dict"][k]) for k, v in first["state_dict"].items())


def test_metadata_and_hash_are_written(tiny_sd15, tmp_path):
    model = FAMILY.load(tiny_sd15)
    texts = {"modelspec.sai_model_spec": "1.0.0", "ss_x": "1"}
    FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True, metadata=texts)
    with open(tmp_path / "a.safetensors", "rb") as file:
        wanted = texts | {"modelspec.hash_sha256": "0x" + safetensors_data_hash_of(file)}
    assert read_metadata(tmp_path / "a.safetensors") == wanted


def test_other_tensors_of_the_source_are_kept(tiny_sd15, tmp_path, caplog):
    source = tmp_path / "source.safetensors"
    extra = {"alphas_cumprod": torch.rand(5).double(), "model_ema.decay": torch.ones(1)}
    save_file(load_file(tiny_sd15) | extra, source)
    model = FAMILY.load(source)
    FAMILY.save(model, tmp_path / "out.safetensors", stability_layout=True, dtype=torch.float16)
    written = load_file(tmp_path / "out.safetensors")
    assert written["alphas_cumprod"].equal(extra["alphas_cumprod"]) and "model_ema.decay" not in written
    assert "model_ema" in caplog.text
    # Written over itself: the source is read while the new file has another name.
    FAMILY.save(model, source, stability_layout=True)
    assert load_file(source)["alphas_cumprod"].equal(extra["alphas_cumprod"])
    # The source has changed by that, so what it holds beside the model is no longer trusted.
    FAMILY.save(model, tmp_path / "out.safetensors", stability_layout=True)
    assert "alphas_cumprod" not in load_file(tmp_path / "out.safetensors")
    assert "has changed since it was opened" in caplog.text


def test_sd2_projections_as_convolutions(tiny_sd21, tmp_path):
    """SD 2.x files exist with 1x1 convolutions too; inside they are matrices, and so they are written."""
    state = load_file(tiny_sd21)
    path = tmp_path / "conv.safetensors"
    ends = ("proj_in.weight", "proj_out.weight")
    is_unet = [k for k in state if k.startswith("model.diffusion_model.") and k.endswith(ends)]
    assert len(is_unet) == 32
    save_file(state | {k: state[k][:, :, None, None].clone() for k in is_unet}, path)
    model = FAMILY.load(path, v2=True, v_parameterization=True)
    assert model.unet.down_blocks[0].attentions[0].proj_in.weight.ndim == 2
    FAMILY.save(model, tmp_path / "out.safetensors", stability_layout=True, dtype=torch.float16)
    same_tensors(tiny_sd21, tmp_path / "out.safetensors")


def test_oldest_sd1_key_names(tiny_sd15, tmp_path):
    start = "cond_stage_model.transformer."
    state = {k.replace(start + "text_model.", start): v for k, v in load_file(tiny_sd15).items()}
    state = {k: v for k, v in state.items() if "position_ids" not in k}
    save_file(state, tmp_path / "old.safetensors")
    model = FAMILY.load(tmp_path / "old.safetensors")
    new = FAMILY.load(tiny_sd15).text_encoders[0].state_dict()
    assert all(v.equal(new[k]) for k, v in model.text_encoders[0].state_dict().items())
    FAMILY.save(model, tmp_path / "out.safetensors", stability_layout=True, dtype=torch.float16)
    same_tensors(tiny_sd15, tmp_path / "out.safetensors")


def test_markers_of_v_prediction(tiny_sd15, tmp_path, caplog):
    model = FAMILY.load(tiny_sd15, v_parameterization=True)
    model.extras["zero_terminal_snr"] = True
    FAMILY.save(model, tmp_path / "v.safetensors", stability_layout=True)
    written = load_file(tmp_path / "v.safetensors")
    assert written["v_pred"].numel() == written["ztsnr"].numel() == 0
    again = FAMILY.load(tmp_path / "v.safetensors")
    assert "--v_parameterization" in caplog.text
    FAMILY.save(again, tmp_path / "e.safetensors", stability_layout=True)
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "e.safetensors").keys()


def test_another_vae(tiny_sd15, ruled_model, tmp_path):
    model = FAMILY.load(tiny_sd15, vae=ruled_model("sd1"))
    own = FAMILY.load(ruled_model("sd1"))
    assert all(v.equal(own.vae.state_dict()[k]) for k, v in model.vae.state_dict().items())
    FAMILY.save(model, tmp_path / "out.safetensors", stability_layout=True)
    again = FAMILY.load(tmp_path / "out.safetensors")
    assert all(v.equal(own.vae.state_dict()[k]) for k, v in again.vae.state_dict().items())


def test_link_and_dtype(tiny_sd15, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").symlink_to(tiny_sd15)
    (tmp_path / "link.safetensors").symlink_to(Path("folder") / "model.safetensors")
    model = FAMILY.load(tmp_path / "link.safetensors", dtype=torch.bfloat16)
    assert model.source == str(tiny_sd15.resolve())
    assert {p.dtype for part in (model.unet, model.vae, *model.text_encoders) for p in part.parameters()} == {
        torch.bfloat16
    }
    assert not [p for p in model.unet.parameters() if p.is_meta]


# What diffusers makes of our files.


@torch.no_grad()
def diffusers_outputs(pipe, model) -> None:
    """The pipeline's U-Net, text encoder and VAE agree with ours."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    ids = input_ids(model.tokenizers[0], CAPTIONS)[:, 0]
    assert pipe.tokenizer(CAPTIONS, padding="max_length", truncation=True)["input_ids"] == ids.tolist()
    ours = FAMILY.encode_text(model.text_encoders, [ids[:, None]], tokenizers=model.tokenizers).hidden[0]
    torch.testing.assert_close(pipe.text_encoder(ids)[0], ours, atol=1e-4, rtol=1e-4)
    steps = torch.tensor([1, 800])
    theirs = pipe.unet(latents, steps, encoder_hidden_states=ours).sample
    torch.testing.assert_close(
        theirs, FAMILY.predict(model.unet, latents, steps, TextCondition([ours]), {}), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(pipe.vae.decode(latents).sample, model.vae.decode(latents).sample, atol=1e-4, rtol=1e-4)


@pytest.fixture
def folder(opened, tmp_path):
    FAMILY.save(opened[2], tmp_path / "folder", stability_layout=False)
    return tmp_path / "folder"


def test_diffusers_opens_our_folder(opened, folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    diffusers_outputs(pipe, opened[2])
    assert pipe.scheduler.config.prediction_type == opened[2].prediction_type
    assert (pipe.scheduler.config.steps_offset, pipe.scheduler.config.clip_sample) == (1, False)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_diffusers_opens_our_file(opened, folder, tmp_path, suffix):
    from diffusers import StableDiffusionPipeline

    path = tmp_path / f"model.{suffix}"
    FAMILY.save(opened[2], path, stability_layout=True, safetensors=suffix == "safetensors")
    pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    diffusers_outputs(pipe, opened[2])


def test_we_open_a_folder_that_diffusers_wrote(opened, folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    _, v2, model = opened
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.save_pretrained(tmp_path / "theirs", variant="fp16")
    again = FAMILY.load(tmp_path / "theirs", v2=v2, v_parameterization=v2)
    assert prediction(again).equal(prediction(model))
    ours = model.text_encoders[0].state_dict()
    assert all(v.equal(ours[k]) for k, v in again.text_encoders[0].state_dict().items())


def test_sharded_folder(tiny_sd15, tmp_path):
    model = FAMILY.load(tiny_sd15)
    FAMILY.save(model, tmp_path / "m", stability_layout=False)
    unet = tmp_path / "m" / "unet"
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    names = sorted(state)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, keys in shards.items():
        save_file({k: state[k] for k in keys}, unet / name)
    index = {"weight_map": {k: name for name, keys in shards.items() for k in keys}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert prediction(FAMILY.load(tmp_path / "m")).equal(prediction(model))


# Bad input: one line that names the thing.


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as error:
        FAMILY.load(source, **options)
    assert "\n" not in str(error.value) and error.value.remedy
    return str(error.value)


def test_other_families_are_named(tiny_sd15, tiny_sd21, tiny_sdxl, tmp_path):
    assert "Stable Diffusion XL" in refusal(tiny_sdxl)
    assert "1.x, but --v2 is given" in refusal(tiny_sd15, v2=True)
    assert "2.x, but --v2 is not given" in refusal(tiny_sd21)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state = load_file(tiny_sd15)
    save_file(state | {first: torch.zeros(32, 9, 3, 3)}, tmp_path / "inpaint.safetensors")
    assert "inpainting model" in refusal(tmp_path / "inpaint.safetensors")
    save_file(state | {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, tmp_path / "edm.safetensors")
    assert "EDM model" in refusal(tmp_path / "edm.safetensors")
    strangers = {
        "a LoRA": "lora_unet_x.lora_down.weight",
        "a FLUX model": "double_blocks.0.x",
        "a VAE alone": "first_stage_model.encoder.conv_in.weight",
        "a U-Net without a text encoder": first,
        "the SDXL refiner": "conditioner.embedders.0.model.x",
        "no Stable Diffusion model": "weight",
    }
    for what, key in strangers.items():
        save_file({key: torch.zeros(1, 4)}, tmp_path / "other.safetensors")
        message = refusal(tmp_path / "other.safetensors")
        assert what in message and "other.safetensors" in message


def test_other_family_of_a_folder_is_named(tiny_sd15, tiny_sd21, tmp_path):
    FAMILY.save(FAMILY.load(tiny_sd15), tmp_path / "one", stability_layout=False)
    FAMILY.save(FAMILY.load(tiny_sd21, v2=True), tmp_path / "two", stability_layout=False)
    assert "1.x, but --v2 is given" in refusal(tmp_path / "one", v2=True)
    assert "2.x, but --v2 is not given" in refusal(tmp_path / "two")
    (tmp_path / "one" / "text_encoder_2").mkdir()
    assert "Stable Diffusion XL" in refusal(tmp_path / "one")


def test_incomplete_files_are_described(tiny_sd15, tmp_path):
    state = load_file(tiny_sd15)
    path = tmp_path / "bad.safetensors"
    gone = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({k: v for k, v in state.items() if k != gone}, path)
    assert gone in refusal(path) and "the U-Net lacks" in refusal(path)
    save_file(state | {gone: torch.zeros(3, 3)}, path)
    assert "has other shapes in" in refusal(path) and "(3, 3)" in refusal(path)
    save_file(state | {"model.diffusion_model.foo.weight": torch.zeros(1)}, path)
    assert "does not know model.diffusion_model.foo.weight" in refusal(path)
    save_file({k: v for k, v in state.items() if not k.startswith("first_stage_model.")}, path)
    assert "no VAE" in refusal(path) or "VAE lacks" in refusal(path)
    many = {k: v for k, v in state.items() if "output_blocks" not in k}
    save_file(many, path)
    assert "more" in refusal(path) and len(refusal(path)) < 2000
    path.write_bytes(Path(tiny_sd15).read_bytes()[:-1000])
    assert "truncated" in refusal(path)


def test_non_finite_weights_are_named(tiny_sd15, tmp_path):
    state = load_file(tiny_sd15)
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = {k: v.clone() for k, v in state.items()}
        bad["model.diffusion_model.out.2.bias"][1] = value
        save_file(bad, tmp_path / "bad.safetensors")
        assert "non-finite values in model.diffusion_model.out.2.bias" in refusal(tmp_path / "bad.safetensors")


def test_bad_folders(tiny_sd15, tmp_path):
    FAMILY.save(FAMILY.load(tiny_sd15), tmp_path / "good", stability_layout=False)

    def broken(change) -> str:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        return refusal(folder)

    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refusal(tmp_path / "empty")
    assert "missing does not exist" in refusal(tmp_path / "missing")
    assert "neither on this disk nor" in refusal("someone/something")
    assert "no subfolder vae" in broken(lambda f: shutil.rmtree(f / "vae"))
    assert "unet/config.json does not exist" in broken(lambda f: (f / "unet" / "config.json").unlink())
    assert "cannot be read as JSON" in broken(lambda f: (f / "unet" / "config.json").write_text("{"))
    weights = "diffusion_pytorch_model.safetensors"
    assert "has no weight file" in broken(lambda f: (f / "unet" / weights).unlink())
    assert "is empty" in broken(lambda f: (f / "unet" / weights).write_bytes(b""))
    assert "does not fit" in broken(lambda f: shutil.copy(f / "vae" / weights, f / "unet" / weights))


def test_what_a_single_file_cannot_say_is_refused(tiny_sd15, tmp_path):
    from dataclasses import replace

    from library.models.unet_sd import from_config

    model = FAMILY.load(tiny_sd15)
    model.unet = from_config(replace(model.unet.config, norm_num_groups=16))
    with pytest.raises(UserError, match="U-Net norm groups 16"):
        FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True)
    assert not list(tmp_path.iterdir())
    FAMILY.save(model, tmp_path / "folder", stability_layout=False)
    assert FAMILY.load(tmp_path / "folder").unet.config.norm_num_groups == 16
    model.unet = from_config(replace(model.unet.config, norm_num_groups=32, attention_head_dim=4))
    with pytest.raises(UserError, match="attention heads"):
        FAMILY.save(model, tmp_path / "a.safetensors", stability_layout=True)


def test_full_disk_leaves_the_earlier_model(tiny_sd15, tmp_path, monkeypatch):
    import types

    model = FAMILY.load(tiny_sd15)
    FAMILY.save(model, tmp_path / "m", stability_layout=False)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000, total=1, used=1))
    for target, layout in (("m", False), ("m.safetensors", True)):
        with pytest.raises(UserError, match="not enough room"):
            FAMILY.save(model, tmp_path / target, stability_layout=layout)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
