"""Token ids against the original's, from the shipped vocabulary and from a cache folder."""

from __future__ import annotations

import json

import pytest

from library.models import tokenizers as T

KINDS = {"sd1": T.CLIP_L, "sd2": T.OPENCLIP_H, "sdxl_2": T.OPENCLIP_BIGG}


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "datasets_tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    return {name: T.load_tokenizer(kind) for name, kind in KINDS.items()}


def test_unpadded_ids(recorded, loaded):
    cases = [(c["caption"], name, ids) for c in recorded["unpadded_ids"] for name, ids in c["ids"].items()]
    wrong = [(c, name) for c, name, ids in cases if [49406, *T.text_ids(loaded[name], [c])[0], 49407] != ids]
    assert not wrong
    assert {name for _, name, _ in cases} == set(KINDS)


def test_every_layout(recorded, loaded):
    wrong = []
    for case in recorded["layouts"]:
        got = T.input_ids(loaded[case["family"]], [recorded["captions"][case["caption"]]], case["max_token_length"])
        if list(got.shape[1:]) != case["shape"] or got[0].flatten().tolist() != _flat(case["ids"]):
            wrong.append((case["family"], case["max_token_length"], case["caption"]))
    assert not wrong
    assert {c["family"] for c in recorded["layouts"]} == set(KINDS)


def test_batch_equals_single_rows(recorded, loaded):
    captions = recorded["captions"]
    batch = T.input_ids(loaded["sd2"], captions, 150)
    assert all(batch[i].equal(T.input_ids(loaded["sd2"], [c], 150)[0]) for i, c in enumerate(captions))


def test_cache_folder_is_written_then_read(tmp_path, loaded, recorded):
    for name, kind in KINDS.items():
        T.load_tokenizer(kind, tmp_path)
        folder = tmp_path / kind.cache_name
        assert {p.name for p in folder.iterdir()} == {
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
            "tokenizer_config.json",
        }
        again = T.load_tokenizer(kind, tmp_path)
        captions = recorded["captions"]
        assert T.input_ids(again, captions, 225).equal(T.input_ids(loaded[name], captions, 225))
        assert (again.model_max_length, again.pad_token_id) == (77, kind.pad_id)


def test_cache_folder_beats_the_shipped_vocabulary(tmp_path):
    folder = tmp_path / T.CLIP_L.cache_name
    T.write_tokenizer_folder(folder, T.CLIP_L)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert T.text_ids(T.load_tokenizer(T.CLIP_L, tmp_path), ["cat"]) == T.text_ids(T.load_tokenizer(T.CLIP_L), ["dog"])


def test_broken_cache_folder_is_named(tmp_path):
    folder = tmp_path / T.CLIP_L.cache_name
    T.write_tokenizer_folder(folder, T.CLIP_L)
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(T.UserError, match="openai_clip-vit-large-patch14"):
        T.load_tokenizer(T.CLIP_L, tmp_path)


def test_added_tokens():
    tokenizer = T.load_tokenizer(T.CLIP_L)
    assert tokenizer.add_tokens(["zzqx", "zzqx1"]) == 2
    assert tokenizer.convert_tokens_to_ids(["zzqx", "zzqx1"]) == [49408, 49409]
    assert T.input_ids(tokenizer, ["a zzqx cat"])[0, 0, :5].tolist() == [49406, 320, 49408, 2368, 49407]


def test_reference_check_line():
    ids = T.input_ids(T.load_tokenizer(T.CLIP_L), ["a photo of a cat, naïve 12"])[0, 0, :13]
    wanted = "49406 320 1125 539 320 2368 267 1097 35689 563 272 273 49407"
    assert ids.tolist() == [int(x) for x in wanted.split()]


def test_longest_row():
    tokenizer = T.load_tokenizer(T.OPENCLIP_H)
    ids = T.without_padding(T.input_ids(tokenizer, ["a photo of a cat", "cat"]), tokenizer.eos_token_id)
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 2368, 49407, 0, 0, 0, 0]]


def test_wrong_length_is_refused():
    with pytest.raises(T.UserError, match="multiple of 75"):
        T.input_ids(T.load_tokenizer(T.CLIP_L), ["x"], 100)


def _flat(values):
    return [v for row in values for v in row] if values and isinstance(values[0], list) else values
