"""The VAE: recorded numbers, and files of every kind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.messages import UserError
from library.models.vae import decode_latents, encode_images, load_vae


@pytest.fixture(scope="module")
def small(ruled_model, golden):
    return load_vae(ruled_model("sd1")), load_file(golden / "models_tiny_vae.safetensors")


@torch.no_grad()
def test_recorded_numbers(small):
    vae, recorded = small
    checked = set()
    for prefix, image in (("moments", "image"), ("odd", "image_odd")):
        posterior = vae.encode(recorded[image]).latent_dist
        for name in ("mean", "logvar"):
            torch.testing.assert_close(getattr(posterior, name), recorded[f"{prefix}.{name}"], atol=2e-5, rtol=1e-5)
            checked |= {image, f"{prefix}.{name}"}
    mean, logvar = recorded["moments.raw"].chunk(2, dim=1)
    posterior = vae.encode(recorded["image"]).latent_dist
    torch.testing.assert_close(posterior.mean, mean, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, logvar.clamp(-30, 20), atol=2e-5, rtol=1e-5)
    torch.manual_seed(7)
    torch.testing.assert_close(encode_images(vae, recorded["image"]), recorded["sample_seed7"], atol=1e-4, rtol=1e-4)
    for latent, image in (("latent", "decoded"), ("latent_odd", "decoded_odd")):
        torch.testing.assert_close(decode_latents(vae, recorded[latent]), recorded[image], atol=1e-4, rtol=1e-4)
        checked |= {latent, image}
    assert checked | {"moments.raw", "sample_seed7"} == set(recorded)


def test_slices_change_nothing(small):
    vae, recorded = small
    generator = torch.Generator().manual_seed(1)
    whole = encode_images(vae, recorded["image"], generator=torch.Generator().manual_seed(1))
    parts = encode_images(vae, recorded["image"], slice_size=1, generator=generator)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    decoded = decode_latents(vae, recorded["latent"])
    torch.testing.assert_close(decode_latents(vae, recorded["latent"], slice_size=1), decoded, atol=1e-5, rtol=1e-5)


def stability_state(path) -> dict[str, torch.Tensor]:
    prefix = "first_stage_model."
    return {k[len(prefix) :]: v for k, v in load_file(path).items() if k.startswith(prefix)}


OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_names(state):
    result = {}
    for key, value in state.items():
        for new, old in OLD.items():
            key = key.replace(new, old)
        result[key] = value
    return result


@pytest.mark.parametrize(
    "kind",
    ["full", "alone", "with_prefix", "pt", "wrapped_pt", "extra_keys", "bin", "diffusers", "old_diffusers", "half"],
)
def test_files_of_every_kind(tmp_path, small, ruled_model, kind):
    vae, recorded = small
    ours = {k: v.contiguous() for k, v in vae.state_dict().items()}
    state = stability_state(ruled_model("sd1"))
    path = tmp_path / ("v.safetensors" if kind not in ("pt", "wrapped_pt", "bin") else f"v.{kind[-3:].lstrip('_')}")
    if kind == "full":
        path = ruled_model("sd2")  # the same weights, inside another model
    elif kind == "with_prefix":
        save_file({f"first_stage_model.{k}": v for k, v in state.items()}, path)
    elif kind == "pt":
        torch.save(state, path)
    elif kind == "wrapped_pt":
        torch.save({"state_dict": state, "epoch": 1}, path)
    elif kind == "extra_keys":
        save_file(state | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, path)
    elif kind == "bin":
        torch.save(ours, path)
    elif kind == "diffusers":
        save_file(ours, path)
    elif kind == "old_diffusers":
        save_file(old_names(ours), path)
    elif kind == "half":
        save_file({k: v.half() for k, v in state.items()}, path)
    else:
        save_file(state, path)
    got = load_vae(path)
    assert got.dtype == torch.float32
    tolerance = 2e-2 if kind == "half" else 1e-6
    torch.testing.assert_close(
        decode_latents(got, recorded["latent"]), decode_latents(vae, recorded["latent"]), atol=tolerance, rtol=tolerance
    )
    assert load_vae(path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("inside", [False, True])
def test_folders(tmp_path, small, names, inside):
    vae, _ = small
    folder = tmp_path / "vae" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    state = {k: v.contiguous() for k, v in vae.state_dict().items()}
    save_file(state if names == "new" else old_names(state), folder / "diffusion_pytorch_model.safetensors")
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}), encoding="utf-8")
    got = load_vae(tmp_path)
    assert got.config.scaling_factor == 0.5
    assert all(v.equal(state[k]) for k, v in got.state_dict().items())


def test_what_is_no_vae(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors is no VAE"):
        load_vae(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        load_vae(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_vae(tmp_path)
    with pytest.raises(UserError, match="some/vae is neither on this disk nor to be had"):
        load_vae("some/vae")


def test_non_finite_vae_is_named(tmp_path, ruled_model):
    state = stability_state(ruled_model("sd1"))
    state["decoder.conv_in.bias"][0] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors holds non-finite values in decoder\.conv_in\.bias"):
        load_vae(tmp_path / "bad.safetensors")
