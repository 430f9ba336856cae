"""SDXL models under the old names: what other programs import from `library.sdxl_model_util` and `sdxl_train_util`."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library import sdxl_model_util, sdxl_train_util, train_util
from library.messages import UserError
from library.models.sdxl import StableDiffusionXL
from library.models.sdxl_loading import LOGIT_SCALE
from library.models.text_encoders import text_state_dict
from library.models.tokenizers import input_ids
from tests.models.test_sd import dtype_of, same_tensors


@pytest.fixture(scope="module")
def loaded(tiny_sdxl):
    return sdxl_model_util.load_models_from_sdxl_checkpoint(None, str(tiny_sdxl), "cpu", torch.float16)


def test_load_and_save(loaded, tiny_sdxl, tmp_path):
    te1, te2, vae, unet, logit_scale, info = loaded
    assert (unet.dtype, vae.dtype, te1.dtype, te2.dtype) == (torch.float16, torch.float16, torch.float32, torch.float32)
    assert info is None
    arguments = (te1, te2, unet, 2, 5, (1, 10), vae, logit_scale)
    path = str(tmp_path / "a.safetensors")
    count = sdxl_model_util.save_stable_diffusion_checkpoint(path, *arguments, None, dtype_of(tiny_sdxl))
    same_tensors(tiny_sdxl, path)
    assert count == len(load_file(path))
    metadata = {"modelspec.prediction_type": "v"}
    sdxl_model_util.save_stable_diffusion_checkpoint(str(tmp_path / "a.ckpt"), *arguments, metadata)
    written = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (3, 15) and "v_pred" in written["state_dict"]
    again = sdxl_model_util.load_models_from_sdxl_checkpoint("sdxl", tmp_path / "a.ckpt", "cpu", disable_mmap=True)
    assert again[5] == (3, 15)
    with pytest.raises(UserError, match="does not exist"):
        sdxl_model_util.load_models_from_sdxl_checkpoint(None, tmp_path / "b.ckpt", "cpu")


def test_folder(loaded, tiny_sdxl, tmp_path):
    te1, te2, _, unet, *_ = loaded
    folder = tmp_path / "m"
    sdxl_model_util.save_diffusers_checkpoint(
        str(folder), te1, te2, unet, str(tiny_sdxl), use_safetensors=True, save_dtype=torch.float16
    )
    is_file, first, second, vae, unet2, logit_scale, info = sdxl_train_util._load_target_model(
        str(folder), str(tiny_sdxl), "sdxl_base_v1-0", torch.bfloat16
    )
    assert (is_file, logit_scale, info, vae.dtype, unet2.dtype) == (False, None, None, torch.bfloat16, torch.float32)
    assert {first.dtype, second.dtype} == {torch.float32}
    assert all(v.half().equal(unet.state_dict()[k]) for k, v in unet2.state_dict().items())
    with pytest.raises(UserError, match="VAE is missing"):
        sdxl_model_util.save_diffusers_checkpoint(str(folder), te1, te2, unet, None)


def test_load_target_model(tiny_sdxl, monkeypatch):
    state = SimpleNamespace(num_processes=2, local_process_index=1)
    accelerator = SimpleNamespace(device="cpu", state=state, wait_for_everyone=lambda: None)
    args = SimpleNamespace(
        pretrained_model_name_or_path=str(tiny_sdxl), vae=None, lowram=True, full_fp16=False, full_bf16=True
    )
    got = sdxl_train_util.load_target_model(args, accelerator, "sdxl_base_v1-0", torch.bfloat16)
    assert len(got) == 7 and got[0] is True and got[4].dtype == torch.bfloat16
    with pytest.raises(UserError, match="mixed_precision"):
        sdxl_train_util.load_target_model(args, accelerator, "sdxl_base_v1-0", torch.float32)
    monkeypatch.setattr(sdxl_train_util, "_load_target_model", lambda *given: given)
    assert sdxl_train_util.load_target_model(args, accelerator, "x", torch.bfloat16)[2:] == (
        "x",
        torch.bfloat16,
        "cpu",
        torch.bfloat16,
    )


@torch.no_grad()
def test_text(loaded):
    te1, te2, *_ = loaded
    tokenizers = sdxl_train_util.load_tokenizers(SimpleNamespace(tokenizer_cache_dir=None))
    ids = [input_ids(tokenizer, ["a", "b c"], 150) for tokenizer in tokenizers]
    h1, h2, pool = train_util.get_hidden_states_sdxl(150, *ids, *tokenizers, te1, te2, torch.float16)
    wanted = StableDiffusionXL().encode_text([te1, te2], ids, tokenizers=tokenizers, max_token_length=150)
    assert h1.equal(wanted.hidden[0].half()) and h2.equal(wanted.hidden[1].half()) and pool.equal(wanted.pooled)
    last = te2(ids[1][:, 0]).last_hidden_state
    assert train_util.pool_workaround(te2, last, ids[1][:, 0], tokenizers[1].eos_token_id).allclose(pool, atol=1e-5)


def test_sizes(golden):
    data = load_file(golden / "training_text.safetensors")
    pairs = [data[f"size.{name}"] for name in ("original_hw", "crop_top_left", "target_hw")]
    got = sdxl_train_util.get_size_embeddings(*pairs, "cpu")
    torch.testing.assert_close(got, data["size.embedding"], atol=1e-6, rtol=0)
    assert sdxl_train_util.get_timestep_embedding(pairs[0], 256).equal(got[:, :512])
    assert sdxl_train_util.timestep_embedding(pairs[0][:, 0], 256).equal(got[:, :256])


def test_unet_names_of_a_folder(golden):
    recorded = json.loads(gzip.decompress((golden / "models_keys_sdxl.json.gz").read_bytes()))
    ours = {key: torch.empty(shape, device="meta") for key, shape in recorded["modules"]["unet"].items()}
    theirs = sdxl_model_util.convert_sdxl_unet_state_dict_to_diffusers(ours)
    assert [(a, b) for a, b in zip(ours, theirs, strict=True)] == [tuple(p) for p in recorded["unet_pairs"]]
    back = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(theirs)
    assert all(back[key] is ours[key] for key in ours)
    pairs = sdxl_model_util.make_unet_conversion_map()
    assert len(pairs) == 124 and all(a.endswith(".") and b.endswith(".") for a, b in pairs)
    with pytest.raises(AssertionError, match="foo"):
        sdxl_model_util.convert_unet_state_dict({"foo.weight": torch.zeros(1)}, dict(pairs))
    config = sdxl_model_util.DIFFUSERS_SDXL_UNET_CONFIG
    assert (config["cross_attention_dim"], config["transformer_layers_per_block"]) == (2048, [1, 2, 10])


def test_second_text_encoder_names(loaded, tiny_sdxl):
    state = {k: v for k, v in load_file(tiny_sdxl).items() if k.startswith("conditioner.embedders.1.model.")}
    got, scale = sdxl_model_util.convert_sdxl_text_encoder_2_checkpoint(state, 77)
    own = text_state_dict(loaded[1])
    assert got.keys() == own.keys() and all(v.float().equal(own[k]) for k, v in got.items())
    back = sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(got, scale)
    assert {f"conditioner.embedders.1.model.{k}": v.shape for k, v in back.items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(v.equal(state[f"conditioner.embedders.1.model.{k}"]) for k, v in back.items())
    assert LOGIT_SCALE in state and "logit_scale" not in sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(
        got, None
    )


def test_tensors_for_a_module_without_memory():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    answer = sdxl_model_util._load_state_dict_on_device(module, state, "cpu", torch.float16)
    assert str(answer) == "<All keys matched successfully>" and module.weight.dtype == torch.float16
    with pytest.raises(RuntimeError, match="missing: bias; unexpected: foo"):
        sdxl_model_util._load_state_dict_on_device(module, {"weight": state["weight"], "foo": state["bias"]}, "cpu")
