"""Captions of textual inversion against the original's: templates, words written out, token ids for each layer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data import captions
from library.data.records import SubsetSettings
from library.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, write_out
from library.models.embedding_files import XTI_LAYERS
from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG, input_ids, load_tokenizer
from library.training.new_word import NewWord, add_word

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "embeddings_captions.json").read_text(encoding="utf-8"))["cases"]
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, None: None}
# Layers whose ids are recorded.
RECORDED_LAYERS = [XTI_LAYERS.index(layer) for layer in ("IN01", "IN08", "OUT06", "OUT11")]


class Replacements(list):
    def add_replacement(self, source: str, target: str | list[str]) -> None:
        self.append((source, target))


def test_templates_are_those_of_the_original() -> None:
    recorded = json.loads((GOLDEN / "embeddings_templates.json").read_text(encoding="utf-8"))
    assert list(OBJECT_TEMPLATES) == recorded["object"]
    assert list(STYLE_TEMPLATES) == recorded["style"]


def subset_of(options: list[str]) -> tuple[SubsetSettings, int | None]:
    given = {"caption_extension": ".txt"}
    words = iter(options)
    length = None
    for word in words:
        if word == "--shuffle_caption":
            given["shuffle_caption"] = True
        elif word == "--keep_tokens":
            given["keep_tokens"] = int(next(words))
        elif word == "--max_token_length":
            length = int(next(words))
        else:
            given[word.removeprefix("--")] = next(words)
    return SubsetSettings(**given), length


def without_tail(row: list[int]) -> list[int]:
    """A row without the repetitions of its last id."""
    end = len(row)
    while end > 1 and row[end - 2] == row[-1]:
        end -= 1
    return row[:end]


def check_ids(case: dict[str, Any], item: dict[str, Any], text: str, word: NewWord, length: int | None) -> list[str]:
    """Names of the recorded id lists that differ."""
    kinds = (CLIP_L, OPENCLIP_BIGG) if case["kind"] == "sdxl" else (CLIP_L,)
    wrong = []
    for number, kind in enumerate(kinds, 1):
        tokenizer = load_tokenizer(kind)
        add_word([tokenizer], "mytoken", case["num_vectors"], layered=case["xti"])
        ids = input_ids(tokenizer, [text], length)[0]
        rows = word.for_layers(ids)[RECORDED_LAYERS, 0].tolist() if case["xti"] else ids.tolist()
        key = f"input_ids{number if number > 1 else ''}_without_repeated_tail"
        whole = case["name"].startswith("long")
        if [row if whole else without_tail(row) for row in rows] != item[key]:
            wrong.append(key)
    return wrong


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_captions_of_the_original(case: dict[str, Any]) -> None:
    """Draws follow one generator over all items, as in the recorded runs."""
    word = add_word([load_tokenizer(CLIP_L)], "mytoken", case["num_vectors"], layered=case["xti"])
    replacements = Replacements()
    write_out(replacements, "mytoken", word.tokens, TEMPLATES[case["template"]])
    subset, length = subset_of(case["options"])
    rng = random.Random(case["python_random_seed_before_first_item"])
    wrong = []
    for item in case["items"]:
        raw = case["caption_files"][int(item["image"][1 : -len(".png")])]
        text = captions.process(
            case["class_tokens"] if raw is None else raw,
            subset,
            rng,
            epoch=1,
            step=0,
            max_train_steps=0,
            replacements=replacements,
        )
        if not case["xti"] and text != item["caption"]:
            wrong.append((item["image"], text, item["caption"]))
        wrong += [(item["image"], key) for key in check_ids(case, item, text, word, length)]
    assert wrong == []


def test_ids_for_layers() -> None:
    word = NewWord("t", ("t", "t1"), (10, 11), ((12, 13), (14, 15)))
    ids = torch.tensor([[1, 10, 11, 2], [11, 10, 5, 2]])
    assert word.for_layers(ids).tolist() == [
        [[1, 12, 13, 2], [13, 12, 5, 2]],
        [[1, 14, 15, 2], [15, 14, 5, 2]],
    ]
    assert word.trained_ids == [12, 13, 14, 15]
    assert word.prompt_replacement == ("t", "t t1")
    assert word.words.expand([1, 10], 1) == [1, 14, 15]


def test_captions_of_regularisation_pictures_stay(tmp_path: Path) -> None:
    from PIL import Image

    from library.data import sources
    from library.data.group import build_group
    from library.data.records import DatasetSettings

    for name in ("own", "reg"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
    subsets = tuple(
        SubsetSettings(image_dir=str(tmp_path / name), class_tokens=f"mytoken {name}", is_reg=name == "reg")
        for name in ("own", "reg")
    )
    settings = DatasetSettings(subsets=subsets, resolution=(64, 64), batch_size=2)
    group = build_group([settings], [sources.scan(settings, seed=1)], tokenize=None, seed=1)
    write_out(group, "mytoken", ("mytoken", "mytoken1"))
    texts = group.batch(group.plan(1, 1).batches[0][0], epoch=1, step=0)["captions"]
    assert sorted(texts) == ["mytoken mytoken1 own", "mytoken reg"]
    write_out(group, "mytoken", ("mytoken",), OBJECT_TEMPLATES)
    texts = group.batch(group.plan(1, 1).batches[0][0], epoch=1, step=0)["captions"]
    assert "mytoken reg" in texts
    assert len([text for text in texts if text in {t.format("mytoken") for t in OBJECT_TEMPLATES}]) == 1
