"""Old names around models, called as third parties call them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library import model_util, sai_model_spec, train_util
from library.messages import UserError
from library.models.sd import StableDiffusion

MODEL_UTIL = {
    "load_models_from_stable_diffusion_checkpoint": "v2, ckpt_path, device, dtype, unet_use_linear_projection_in_v2",
    "save_stable_diffusion_checkpoint": (
        "v2, output_file, text_encoder, unet, ckpt_path, epochs, steps, metadata, save_dtype, vae"
    ),
    "save_diffusers_checkpoint": (
        "v2, output_dir, text_encoder, unet, pretrained_model_name_or_path, vae, use_safetensors"
    ),
    "load_vae": "vae_id, dtype",
    "load_checkpoint_with_text_encoder_conversion": "ckpt_path, device",
    "is_safetensors": "path",
    "get_model_version_str_for_sd1_sd2": "v2, v_parameterization",
    "convert_unet_state_dict_to_sd": "v2, unet_state_dict",
    "convert_vae_state_dict": "vae_state_dict",
    "convert_text_encoder_state_dict_to_sd_v2": "checkpoint, make_dummy_weights",
    "convert_ldm_unet_checkpoint": "v2, checkpoint, config",
    "convert_ldm_vae_checkpoint": "checkpoint, config",
    "create_unet_diffusers_config": "v2, use_linear_projection_in_v2",
    "create_vae_diffusers_config": "",
    "convert_ldm_clip_checkpoint_v1": "checkpoint",
    "convert_ldm_clip_checkpoint_v2": "checkpoint, max_length",
}
TRAIN_UTIL = {
    "load_tokenizer": "args",
    "load_target_model": "args, weight_dtype, accelerator, unet_use_linear_projection_in_v2",
    "_load_target_model": "args, weight_dtype, device, unet_use_linear_projection_in_v2",
    "get_hidden_states": "args, input_ids, tokenizer, text_encoder, weight_dtype",
    "model_hash": "filename",
    "calculate_sha256": "filename",
    "precalculate_safetensors_hashes": "tensors, metadata",
    "get_sai_model_spec": "state_dict, args, sdxl, lora, textual_inversion, is_stable_diffusion_ckpt",
    "transform_models_if_DDP": "models",
    "transform_if_model_is_DDP": "text_encoder, unet, network",
}


@pytest.mark.parametrize(("module", "table"), [(model_util, MODEL_UTIL), (train_util, TRAIN_UTIL)])
def test_signatures(module, table):
    for name, arguments in table.items():
        assert ", ".join(inspect.signature(getattr(module, name)).parameters) == arguments, name


def test_every_entry_resolves():
    for module in (model_util, sai_model_spec):
        assert all(getattr(module, name) is not None for name in module.NAMES)
        assert set(dir(module)) == set(module.NAMES)
    assert model_util.DIFFUSERS_REF_MODEL_ID_V2 == "stabilityai/stable-diffusion-2-1"
    assert train_util.model_util is model_util and train_util.sai_model_spec is sai_model_spec
    with pytest.raises(AttributeError):
        model_util.nothing  # noqa: B018


@pytest.fixture(params=["sd1", "sd2"])
def case(request, tiny_sd15, tiny_sd21):
    v2 = request.param == "sd2"
    return v2, tiny_sd21 if v2 else tiny_sd15


def same(first, second):
    assert first.keys() == second.keys()
    assert not [k for k in first if not (first[k].shape == second[k].shape and first[k].equal(second[k]))]


def test_load_and_save(case, tmp_path):
    v2, path = case
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(v2, str(path))
    out = str(tmp_path / "out.safetensors")
    count = model_util.save_stable_diffusion_checkpoint(
        v2, out, text_encoder, unet, str(path), 1, 2, {"a": "b"}, torch.float16
    )
    same(load_file(path), load_file(out))  # the VAE came from the source
    assert count == len(load_file(out))
    count = model_util.save_stable_diffusion_checkpoint(
        v2, str(tmp_path / "out.ckpt"), text_encoder, unet, None, 1, 2, None, torch.float16, vae
    )
    wrapper, state = model_util.load_checkpoint_with_text_encoder_conversion(str(tmp_path / "out.ckpt"))
    assert (wrapper["epoch"], wrapper["global_step"], wrapper["state_dict"]) == (1, 2, state)
    assert state.keys() == load_file(path).keys() and count == len(state)
    with pytest.raises(UserError, match="VAE is missing"):
        model_util.save_stable_diffusion_checkpoint(v2, out, text_encoder, unet, None, 1, 2, None)


def test_save_diffusers(case, tmp_path):
    v2, path = case
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(v2, path)
    model_util.save_diffusers_checkpoint(v2, tmp_path / "a", text_encoder, unet, None, vae=vae, use_safetensors=True)
    model_util.save_diffusers_checkpoint(v2, tmp_path / "b", text_encoder, unet, tmp_path / "a")
    again = StableDiffusion().load(tmp_path / "b", v2=v2)
    same(dict(unet.state_dict()), dict(again.unet.state_dict()))
    same(dict(vae.state_dict()), dict(again.vae.state_dict()))


def test_converters_are_inverse(case):
    v2, path = case
    _, state = model_util.load_checkpoint_with_text_encoder_conversion(path)
    whole = dict(state)
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(v2, path)
    unet_config = model_util.create_unet_diffusers_config(v2, True)
    ours = model_util.convert_ldm_unet_checkpoint(v2, state, unet_config)
    same({k: v.float() for k, v in ours.items()}, dict(unet.state_dict()))
    assert not any(k.startswith("model.diffusion_model.") for k in state)
    back = model_util.convert_unet_state_dict_to_sd(v2, ours)
    same({f"model.diffusion_model.{k}": v for k, v in back.items()}, {k: whole[k] for k in whole.keys() - state.keys()})

    ours = model_util.convert_ldm_vae_checkpoint(whole, model_util.create_vae_diffusers_config())
    same({k: v.float() for k, v in ours.items()}, dict(vae.state_dict()))
    back = model_util.convert_vae_state_dict(ours)
    prefix = model_util.VAE_PREFIX
    same({prefix + k: v for k, v in back.items()}, {k: v for k, v in whole.items() if k.startswith(prefix)})

    own = {k: v for k, v in text_encoder.state_dict().items() if "position_ids" not in k}
    if v2:
        ours = model_util.convert_ldm_clip_checkpoint_v2(whole, 77)
        back = model_util.convert_text_encoder_state_dict_to_sd_v2(ours, make_dummy_weights=True)
        stored = {k.removeprefix("cond_stage_model.model."): v for k, v in whole.items() if ".model.t" in k}
        assert back.keys() >= stored.keys()
        assert not [
            k for k in stored if "resblocks.3" not in k and k != "text_projection" and not stored[k].equal(back[k])
        ]
        assert back["transformer.resblocks.3.ln_1.weight"].equal(back["transformer.resblocks.2.ln_1.weight"])
    else:
        ours = model_util.convert_ldm_clip_checkpoint_v1(whole)
    same({k: v.float() for k, v in ours.items()}, own)


def test_projections_as_convolutions(tiny_sd21):
    state = load_file(tiny_sd21)
    config = model_util.create_unet_diffusers_config(True, False)
    ours = model_util.convert_ldm_unet_checkpoint(True, dict(state), config)
    projections = [k for k in ours if k.endswith(("proj_in.weight", "proj_out.weight"))]
    assert len(projections) == 32 and all(ours[k].ndim == 4 for k in projections)
    back = model_util.convert_unet_state_dict_to_sd(True, ours)
    assert all(v.equal(state[f"model.diffusion_model.{k}"]) for k, v in back.items())
    model_util.conv_transformer_to_linear(ours)
    assert all(ours[k].ndim == 2 for k in projections)


def test_train_util_with_a_namespace(case, tmp_path):
    v2, path = case
    args = SimpleNamespace(
        v2=v2,
        pretrained_model_name_or_path=str(path),
        vae=str(path),
        lowram=True,
        clip_skip=2,
        max_token_length=150,
        tokenizer_cache_dir=str(tmp_path),
    )
    waits = []
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        state=SimpleNamespace(num_processes=2, local_process_index=1),
        wait_for_everyone=lambda: waits.append(1),
    )
    text_encoder, vae, unet, is_file = train_util.load_target_model(args, torch.float16, accelerator)
    assert (vae.dtype, unet.dtype, is_file, len(waits)) == (torch.float16, torch.float32, True, 2)
    tokenizer = train_util.load_tokenizer(args)
    assert tokenizer.pad_token_id == (0 if v2 else 49407) and len(list(tmp_path.iterdir())) == 1
    ids = torch.full((1, 2, 77), tokenizer.eos_token_id)
    hidden = train_util.get_hidden_states(args, ids, tokenizer, text_encoder, torch.bfloat16)
    assert hidden.shape == (1, 152, 64) and hidden.dtype == torch.bfloat16
    texts = train_util.get_sai_model_spec(
        None, SimpleNamespace(v2=v2, output_name="o", clip_skip=None), False, True, False
    )
    assert texts["modelspec.title"] == "o" and texts["modelspec.architecture"].endswith("/lora")
    wrapped = SimpleNamespace(module=unet)
    assert train_util.transform_models_if_DDP([None, wrapped, vae]) == [unet, vae]
    assert list(train_util.transform_if_model_is_DDP(text_encoder, wrapped)) == [text_encoder, unet]


def test_spec_names():
    assert sai_model_spec.load_bytes_in_safetensors({"a": torch.tensor([1.0])}) == b"\x00\x00\x80?"
    assert sai_model_spec.precalculate_safetensors_hashes({"a": torch.zeros(1)}).startswith("0x")
    with pytest.raises(NotImplementedError):
        sai_model_spec.update_hash_sha256({}, {})
