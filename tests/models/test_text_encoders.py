"""Text encoders: recorded hidden states, chunks, weighted captions, names under this version of transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.messages import UserError
from library.models import text_encoders as T
from library.models.sd import StableDiffusion
from library.models.sdxl import StableDiffusionXL, size_vector


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def small(request, ruled_model, golden):
    model = StableDiffusion().load(ruled_model(request.param), v2=request.param == "sd2")
    return model.text_encoders[0], load_file(golden / f"models_tiny_text_{request.param}.safetensors")


@torch.no_grad()
def test_recorded_hidden_states(small):
    encoder, recorded = small
    checked = {k for k in recorded if k.startswith("ids_")}
    for name, wanted in recorded.items():
        if name.startswith("ids_") or "short" in name:
            continue
        _, length, _, _, skip = name.split("_")
        clip_skip = None if skip == "None" else int(skip)
        limit = None if length == "77" else int(length)
        got = T.encode_chunks(encoder, recorded[f"ids_{length}"], clip_skip=clip_skip, max_token_length=limit)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0, msg=name)
        checked.add(name)
    # 0.7.0 ignores clip skip for ids without padding; here it counts, so the recorded state is that of no clip skip.
    short = T.encode_chunks(encoder, recorded["ids_short"])
    torch.testing.assert_close(short, recorded["hidden_short_clip_skip_2"], atol=2e-5, rtol=0)
    skipped = T.encode_chunks(encoder, recorded["ids_short"], clip_skip=2, dtype=torch.float16)
    assert skipped.dtype == torch.float16 and not torch.allclose(skipped.float(), short, atol=1e-2)
    assert checked | {"hidden_short_clip_skip_2"} == set(recorded)


def test_bad_clip_skip(small):
    encoder, recorded = small
    for value in (0, -1, 99):
        with pytest.raises(UserError, match="clip_skip"):
            T.encode_chunks(encoder, recorded["ids_77"], clip_skip=value)


def test_module_and_key_names(small):
    encoder, _ = small
    modules = dict(encoder.named_modules())
    path = "text_model.encoder.layers.0.self_attn"
    assert type(modules[path]).__name__ in ("CLIPAttention", "CLIPSdpaAttention")
    assert type(modules["text_model.encoder.layers.0.mlp"]).__name__ == "CLIPMLP"
    assert all(type(modules[f"{path}.{n}_proj"]) is nn.Linear for n in ("q", "k", "v", "out"))
    assert all(key.startswith("text_model.") for key in encoder.state_dict() if "position_ids" not in key)
    assert encoder.get_input_embeddings() is modules["text_model.embeddings.token_embedding"]
    assert encoder.dtype == torch.float32


def test_foreign_encoder_is_adopted():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = T.text_config(T.TextDimensions(64, 2, 64, vocabulary=100))
    foreign = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    adopted = T.adopt(foreign)
    assert all(key.startswith("text_model.") for key in T.text_state_dict(adopted))
    ids = torch.randint(0, 100, (1, 77))
    with torch.no_grad():
        assert adopted(ids)[0].equal(foreign(ids)[0])
    assert T.adopt(adopted) is adopted
    stand_in = nn.Linear(1, 1)
    assert T.adopt(stand_in) is stand_in


def test_gradient_checkpointing_changes_no_gradient(tiny_sd15):
    encoder = StableDiffusion().load(tiny_sd15).text_encoders[0].train()
    ids = torch.randint(0, 49408, (1, 77))
    weight = encoder.text_model.encoder.layers[0].mlp.fc1.weight
    grads = []
    for switch in (False, True):
        if switch:
            T.enable_gradient_checkpointing(encoder)
        encoder.zero_grad()
        T.encode_rows(encoder, ids, 2).square().mean().backward()
        grads.append(weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_resized_embeddings_are_saved_and_used(tiny_sd15):
    """Textual inversion adds rows to the token table."""
    encoder = StableDiffusion().load(tiny_sd15).text_encoders[0]
    encoder.resize_token_embeddings(49410)
    assert T.text_state_dict(encoder)["text_model.embeddings.token_embedding.weight"].shape[0] == 49410
    assert T.saved_text_config(encoder)["vocab_size"] == 49410
    with torch.no_grad():
        assert T.encode_rows(encoder, torch.full((1, 77), 49409)).isfinite().all()


class StubEncoder(nn.Module):
    """Hidden states by table, as described in training_text.json."""

    def __init__(self, tables: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.tables, self.positions = tables, positions

    def final_layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])

    def forward(self, ids, output_hidden_states=False, return_dict=True):
        states = tuple(table[ids] + self.positions[: ids.shape[1]] for table in self.tables)
        last = self.final_layer_norm(states[-1])
        return {"hidden_states": states, 0: last, "last_hidden_state": last} if output_hidden_states else (last, states)


@pytest.fixture(scope="module")
def stub(golden):
    recorded = json.loads((golden / "training_text.json").read_text(encoding="utf-8"))
    tensors = load_file(golden / "training_text.safetensors")
    return recorded, tensors, StubEncoder(tensors["te.tables"], tensors["te.positions"])


def test_recorded_conditioning(stub):
    recorded, tensors, encoder = stub
    for case in recorded["cases"]:
        name = case["name"]
        if case["family"] == "sdxl":
            continue  # below
        got = T.encode_chunks(
            encoder, tensors[f"{name}.ids"], clip_skip=case["clip_skip"], max_token_length=case["max_token_length"]
        )
        torch.testing.assert_close(got, tensors[f"{name}.out"], atol=1e-6, rtol=1e-6, msg=name)


class StubProjectingEncoder(StubEncoder):
    def __init__(self, tables: torch.Tensor, positions: torch.Tensor, projection: torch.Tensor) -> None:
        super().__init__(tables, positions)
        self.text_projection = nn.Linear(*projection.T.shape, bias=False)
        self.text_projection.weight.data = projection


def test_recorded_sdxl_conditioning(stub):
    recorded, tensors, _ = stub
    first = StubEncoder(tensors["te1.tables"], tensors["te1.positions"])
    second = StubProjectingEncoder(tensors["te2.tables"], tensors["te2.positions"], tensors["te2.text_projection"])
    tokenizer = SimpleNamespace(eos_token_id=31)
    cases = [case for case in recorded["cases"] if case["family"] == "sdxl"]
    assert len(cases) == 4
    for case in cases:
        name = case["name"]
        text = StableDiffusionXL().encode_text(
            [first, second],
            [tensors[f"{name}.ids1"], tensors[f"{name}.ids2"]],
            tokenizers=[tokenizer, tokenizer],
            max_token_length=case["max_token_length"],
        )
        got = {"hidden1": text.hidden[0], "hidden2": text.hidden[1], "pool2": text.pooled}
        for what, tensor in got.items():
            torch.testing.assert_close(tensor, tensors[f"{name}.{what}"], atol=1e-6, rtol=1e-6, msg=f"{name} {what}")


def test_recorded_size_vector(stub):
    _, tensors, _ = stub
    names = {"original_sizes_hw": "original_hw", "crop_top_lefts": "crop_top_left", "target_sizes_hw": "target_hw"}
    batch = {ours: tensors[f"size.{theirs}"] for ours, theirs in names.items()}
    torch.testing.assert_close(size_vector(batch, torch.device("cpu")), tensors["size.embedding"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_recorded_states_of_both_sdxl_encoders(ruled_model, golden):
    """`pool2_N` is what 0.7.0 gave with an untransposed projection; `_fixed` is wanted."""
    model = StableDiffusionXL().load(ruled_model("sdxl"))
    recorded = load_file(golden / "models_tiny_text_sdxl.safetensors")
    checked = set()
    for length in (77, 150, 225):
        names = [f"{what}_{length}" for what in ("ids1", "ids2", "hidden1", "hidden2")] + [f"pool2_{length}_fixed"]
        ids1, ids2, *wanted = (recorded[name] for name in names)
        text = StableDiffusionXL().encode_text(
            model.text_encoders,
            [ids1, ids2],
            tokenizers=model.tokenizers,
            clip_skip=1,
            max_token_length=None if length == 77 else length,
        )
        for name, tensor, want in zip(names[2:], (*text.hidden, text.pooled), wanted, strict=True):
            torch.testing.assert_close(tensor, want, atol=2e-5, rtol=0, msg=name)
        checked |= {*names, f"pool2_{length}"}
    # An end token more in row 0, none in row 1: the first counts, else position 0. 0.7.0's projection, so undone here.
    second = model.text_encoders[1]
    _, last = T.penultimate_rows(second, recorded["ids2_odd"])
    second.text_projection.weight.data = second.text_projection.weight.data.T.contiguous()
    pooled = T.pooled_rows(second, last, recorded["ids2_odd"], 49407)
    torch.testing.assert_close(pooled, recorded["pool2_odd"], atol=2e-5, rtol=0)
    assert checked | {"ids2_odd", "pool2_odd"} == set(recorded)


def test_recorded_weighted_captions(stub):
    """The stub's layer norm has mean 0, so the recorded factor mean / mean is rounding noise: it is left out here."""
    recorded, tensors, encoder = stub
    for case in recorded["weighted"]:
        ids, weights = T.weighted_rows(
            case["tokens"],
            case["weights"],
            max_chunks=case["max_embeddings_multiples"],
            bos_id=30,
            eos_id=31,
            pad_id=case["pad_id"],
        )
        states = T.encode_rows(encoder, ids.reshape(-1, 77), case["clip_skip"])
        states = states.reshape(len(ids), -1, states.shape[-1])
        wanted = tensors[f"{case['name']}.out"]
        assert list(states.shape) == case["out_shape"]
        weighted = states * weights[..., None]
        factor = (weighted * wanted).sum((1, 2)) / weighted.square().sum((1, 2))
        torch.testing.assert_close(weighted * factor[:, None, None], wanted, atol=1e-4, rtol=1e-5, msg=case["name"])
        for caption, value in enumerate(factor):
            if all(w == 1 for w in case["weights"][caption]):
                assert value == pytest.approx(1, abs=1e-5)
    assert len(recorded["weighted"]) == 7


def test_weights_scale_tokens_and_keep_the_mean():
    hidden = torch.randn(2, 154, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.ones(2, 154)
    weights[0, 2], weights[1, 1:81] = 1.5, 0.5
    got = T.apply_weights(hidden.half(), weights)
    assert got.shape == hidden.shape and got.dtype == torch.float16
    torch.testing.assert_close(got.float().mean((1, 2)), hidden.mean((1, 2)), atol=1e-3, rtol=1e-3)
    ratio = (got.float() / hidden).median(dim=2).values
    scale = ratio[0, 0]  # begin has weight 1
    torch.testing.assert_close(ratio[0, 2] / scale, torch.tensor(1.5), atol=1e-2, rtol=0)
    torch.testing.assert_close(ratio[0, 5] / scale, torch.tensor(1.0), atol=1e-2, rtol=0)


def test_join_chunks_keeps_ends_once():
    hidden = torch.arange(2 * 3 * 77.0).reshape(6, 77, 1)
    joined = T.join_chunks(hidden, 3)
    wanted = [0, *range(1, 76), *range(78, 153), *range(155, 230), 230]
    assert joined[0, :, 0].tolist() == wanted and joined.shape == (2, 227, 1)
