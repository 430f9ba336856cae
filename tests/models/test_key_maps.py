"""Key maps against the full-size manifests, both ways, on the meta device."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
import torch

from library.models import key_maps as K
from library.models.dimensions import (
    clip_dimensions,
    kind_of,
    openclip_dimensions,
    projection_width,
    sdxl_unet_config,
    unet_config,
    vae_dimensions,
)
from library.models.sd_loading import empty_unet, sd_unet_key_map
from library.models.sdxl_loading import LOGIT_SCALE, sdxl_unet_key_map
from library.models.sdxl_loading import empty_unet as empty_sdxl_unet
from library.models.text_encoders import PROJECTING, empty_text_encoder, text_config
from library.models.vae import empty_vae, vae_config

# Manifests of this folder whose models come with a later issue.
LATER = {
    "models_keys_controlnet_sd15.json.gz": "ControlNet",
}


def manifest(golden, name):
    return json.loads(gzip.decompress((golden / f"models_keys_{name}.json.gz").read_bytes()))


def test_later_files_exist(golden):
    assert not [name for name in LATER if not (golden / name).is_file()]


def shapes_in(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def sd_parts(shapes, v2):
    """Part -> shapes of our module, part -> entries."""
    config = unet_config(shapes, "sd2" if v2 else "sd1")
    # The manifest was saved without a source, before the unused block was added.
    text = openclip_dimensions(shapes, unused_layers=0) if v2 else clip_dimensions(shapes)
    ours = {
        "unet": shapes_in(empty_unet(config)),
        "text_encoder": shapes_in(empty_text_encoder(text_config(text))),
        "vae": shapes_in(empty_vae(vae_config(vae_dimensions(shapes), 0.18215))),
    }
    text_entries = (
        K.openclip_entries(ours["text_encoder"], layers=text.layers) if v2 else K.clip_entries(ours["text_encoder"])
    )
    entries = {
        "unet": K.unet_entries(ours["unet"], sd_unet_key_map(config), linear_projections=v2),
        "text_encoder": text_entries,
        "vae": K.vae_entries(ours["vae"], levels=4),
    }
    return ours, entries


def sdxl_parts(shapes):
    second = openclip_dimensions(shapes, K.SDXL_OPENCLIP_PREFIX, unused_layers=0)
    second = dataclasses.replace(second, projection=projection_width(shapes, K.SDXL_OPENCLIP_PREFIX))
    ours = {
        "unet": shapes_in(empty_sdxl_unet(sdxl_unet_config(shapes))),
        "text_encoder": shapes_in(empty_text_encoder(text_config(clip_dimensions(shapes, K.SDXL_CLIP_PREFIX)))),
        "text_encoder_2": shapes_in(empty_text_encoder(text_config(second, PROJECTING))),
        "vae": shapes_in(empty_vae(vae_config(vae_dimensions(shapes), 0.13025))),
    }
    entries = {
        "unet": K.own_entries(ours["unet"], prefix=K.UNET_PREFIX),
        "text_encoder": K.clip_entries(ours["text_encoder"], prefix=K.SDXL_CLIP_PREFIX),
        "text_encoder_2": K.openclip_entries(
            ours["text_encoder_2"], layers=second.layers, prefix=K.SDXL_OPENCLIP_PREFIX
        ),
        "vae": K.vae_entries(ours["vae"], levels=4),
    }
    return ours, entries


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def case(request, golden):
    recorded = manifest(golden, request.param)
    shapes = {k: tuple(v) for k, v in recorded["checkpoint"].items()}
    assert kind_of(shapes) == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[request.param]
    ours, entries = sdxl_parts(shapes) if request.param == "sdxl" else sd_parts(shapes, request.param == "sd21")
    return recorded, shapes, ours, entries


def test_modules_have_the_recorded_keys_and_shapes(case):
    recorded, _, ours, _ = case
    for part, keys in recorded["modules"].items():
        if part in ("unet_conv", "unet_diffusers"):
            continue  # the form that 0.7.0 builds for SD 2.x (here always matrices); SDXL's folder: see below
        wanted = {k: tuple(v) for k, v in keys.items() if not k.endswith("position_ids")}
        assert ours[part] == wanted, part
        if part == "unet":
            assert list(ours[part]) == list(wanted)


def test_entries_are_the_recorded_pairs(case):
    recorded, _, ours, entries = case
    wanted = {
        p[0]: (p[1], tuple(p[2]), p[3])
        for p in recorded["pairs"]
        if p[3] != "conv1x1_to_linear" and not p[0].endswith("position_ids") and p[0] != LOGIT_SCALE
    }
    projection = K.SDXL_OPENCLIP_PREFIX + "text_projection"
    if projection in wanted:  # 0.7.0 did not transpose it
        wanted[projection] = (*wanted[projection][:2], "transpose")
    got = {e.file_key: (part, e.module_keys, e.transform) for part, es in entries.items() for e in es}
    assert got == wanted
    covered = [key for es in entries.values() for e in es for key in e.module_keys]
    assert sorted(covered) == sorted(key for shapes in ours.values() for key in shapes)


def test_shapes_survive_both_directions(case):
    _, shapes, ours, entries = case
    for part, part_entries in entries.items():
        for entry in part_entries:
            tensors = [torch.empty(ours[part][key], device="meta") for key in entry.module_keys]
            in_file = entry.to_file(tensors)
            assert tuple(in_file.shape) == shapes[entry.file_key] == entry.file_shape([t.shape for t in tensors])
            back = dict(entry.to_module(in_file))
            assert {k: tuple(v.shape) for k, v in back.items()} == {k: ours[part][k] for k in entry.module_keys}


def test_conv_form_of_sd2(golden):
    """A U-Net with 1x1 convolutions is written to an SD 2.x file as matrices, as recorded."""
    recorded = manifest(golden, "sd21")
    conv = {k: tuple(v) for k, v in recorded["modules"]["unet_conv"].items()}
    assert len(conv) == 32
    entries = K.unet_entries(conv, K.sd_unet_map(), linear_projections=True)
    wanted = [p for p in recorded["pairs"] if p[3] == "conv1x1_to_linear"]
    assert len(wanted) == 32
    assert {(e.file_key, e.module_keys, e.transform) for e in entries} == {(p[0], tuple(p[2]), p[3]) for p in wanted}


@pytest.mark.parametrize(
    "transform", ["identity", "linear_to_conv1x1", "conv1x1_to_linear", "concat_rows", "transpose"]
)
def test_transforms_are_exact_inverses(transform):
    shape = (6, 6, 1, 1) if transform == "conv1x1_to_linear" else (6, 6)
    keys = ("q", "k", "v") if transform == "concat_rows" else ("w",)
    tensors = {key: torch.randn(shape) for key in keys}
    entry = K.Entry("file", keys, transform)
    back = dict(entry.to_module(entry.to_file([tensors[k] for k in keys])))
    assert list(back) == list(keys) and all(back[k].equal(tensors[k]) for k in keys)


def test_prefix_rules():
    table = K.PrefixMap([("a", "x"), ("a.b", "y")])
    assert [table.to_diffusers(k) for k in ("a", "a.b", "a.b.c", "a.bc", "ab", "c")] == [
        "x",
        "y",
        "y.c",
        "x.bc",
        None,
        None,
    ]
    with pytest.raises(ValueError):
        K.PrefixMap([("a", "x"), ("b", "x")])


def test_every_unet_key_maps_back(golden):
    for name in ("sd15", "sd21"):
        table = K.sd_unet_map()
        assert len(table.rules) == 159
        keys = [k[len(K.UNET_PREFIX) :] for k in manifest(golden, name)["checkpoint"] if k.startswith(K.UNET_PREFIX)]
        assert len(keys) == 686
        assert [table.to_stability(table.to_diffusers(k)) for k in keys] == keys


def test_sdxl_folder_names(golden):
    """Our names are Stability's; those of a diffusers folder follow by 124 rules, both ways."""
    recorded = manifest(golden, "sdxl")
    table = K.sdxl_unet_map()
    assert len(table.rules) == 124
    config = sdxl_unet_config({k: tuple(v) for k, v in recorded["checkpoint"].items()})
    assert sdxl_unet_key_map(config).rules == table.rules
    assert len(recorded["unet_pairs"]) == 1680
    assert [table.to_diffusers(ours) for ours, _ in recorded["unet_pairs"]] == [p[1] for p in recorded["unet_pairs"]]
    assert [table.to_stability(theirs) for _, theirs in recorded["unet_pairs"]] == [
        p[0] for p in recorded["unet_pairs"]
    ]
    shapes = recorded["modules"]
    assert {table.to_diffusers(k): v for k, v in shapes["unet"].items()} == shapes["unet_diffusers"]


def test_a_full_size_sdxl_file_holds_what_is_recorded(golden):
    """Parts, position ids and the scale: 2,515 tensors, none of them twice."""
    recorded = manifest(golden, "sdxl")
    shapes = {k: tuple(v) for k, v in recorded["checkpoint"].items()}
    _, entries = sdxl_parts(shapes)
    written = [e.file_key for part in entries.values() for e in part]
    written += [K.SDXL_CLIP_PREFIX + "text_model.embeddings.position_ids", LOGIT_SCALE]
    assert sorted(written) == sorted(shapes) and len(written) == 2515


def test_old_vae_attention_names_map_to_the_same_file_keys():
    new, old = K.vae_map(), K.vae_map(old_attention_names=True)
    for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        new_key = f"decoder.mid_block.attentions.0.{a}.weight"
        old_key = f"decoder.mid_block.attentions.0.{b}.weight"
        assert new.to_stability(new_key) == old.to_stability(old_key) is not None
        assert K.modern_vae_key(old_key) == new_key == K.modern_vae_key(new_key)
