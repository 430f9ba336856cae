"""Words of textual inversion: token ids against the original's, rows of the token table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from library import messages
from library.messages import UserError
from library.models.embeddings import (
    add_tokens,
    grow_table,
    init_word_ids,
    layer_strings,
    random_rows,
    rows_of,
    set_rows,
    token_strings,
    token_table,
)
from library.models.family import family
from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, load_tokenizer, text_ids

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "embeddings_tokens.json").read_text(encoding="utf-8"))
KINDS = {("sd1", 1): CLIP_L, ("sd2", 1): OPENCLIP_H, ("sdxl", 1): CLIP_L, ("sdxl", 2): OPENCLIP_BIGG}


def tokenizer_of(case: dict[str, Any]) -> Any:
    return load_tokenizer(KINDS[case["kind"], case["tokenizer"]])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['kind']}-{c['tokenizer']}-{c['token_string']}")
def test_tokens_of_the_original(case: dict[str, Any]) -> None:
    tokenizer, strings = tokenizer_of(case), token_strings(case["token_string"], case["num_vectors"])
    if not case["accepted"]:
        if case["num_vectors"] < 1:
            assert strings == []  # refused where the option is read
            return
        with pytest.raises(UserError, match="is a token of the tokenizer already"):
            add_tokens([tokenizer], strings)
        return
    assert strings == case["token_strings"]
    assert add_tokens([tokenizer], strings) == case["ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    wrong = {
        text: (found, ids)
        for text, ids in case["texts"].items()
        if (found := [begin, *text_ids(tokenizer, [text])[0], end]) != ids
    }
    assert wrong == {}


@pytest.mark.parametrize("case", GOLDEN["init_words"], ids=lambda c: f"{c['kind']}-{c['tokenizer']}-{c['init_word']}")
def test_init_words_of_the_original(case: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(case)
    if not case["ids"]:
        with pytest.raises(UserError, match="--init_word is empty"):
            init_word_ids(tokenizer, case["init_word"], 1)
        return
    assert init_word_ids(tokenizer, case["init_word"], len(case["ids"])) == case["ids"]


def test_layer_tokens() -> None:
    strings = layer_strings("word", 2)
    assert len(strings) == 16
    assert strings[0] == ["word_IN01", "word1_IN01"]
    assert strings[-1] == ["word_OUT11", "word1_OUT11"]


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ([""], "empty"),
        ([" word"], "blanks"),
        (["<|endoftext|>"], "already"),
        (["\u201cx\u201d"], "characters that tokenizers change"),
    ],
)
def test_refused(strings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_tokens([load_tokenizer(CLIP_L)], strings)


def test_a_word_that_is_hidden_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(messages.log, "propagate", True)
    tokenizer = load_tokenizer(CLIP_L)
    add_tokens([tokenizer], ["mytokenx"])
    assert caplog.text == ""
    add_tokens([tokenizer], ["stomach"])
    init_word_ids(tokenizer, "white cat, sitting", 2)
    init_word_ids(tokenizer, "white cat", 3)
    assert "'stomach' is an ordinary word" in caplog.text
    assert "only the first are used" in caplog.text
    assert "they are repeated" in caplog.text


def test_tokenizers_that_differ() -> None:
    first, second = load_tokenizer(CLIP_L), load_tokenizer(CLIP_L)
    add_tokens([first], ["qqzzx"])
    with pytest.raises(UserError, match="differ in their number of tokens"):
        add_tokens([first, second], ["mytoken"])


def test_rows(tiny_sd15: Path) -> None:
    encoder = family("sd").load(tiny_sd15).text_encoders[0]
    before = token_table(encoder).weight.detach().clone()
    known = len(before)
    grow_table(encoder, known + 3)
    assert token_table(encoder).weight.shape == (known + 3, before.shape[1])
    assert encoder.config.vocab_size == known + 3
    drawn = random_rows(encoder, 200, known, torch.Generator().manual_seed(1))
    assert drawn.std().item() == pytest.approx(before.std().item(), rel=0.05)
    assert torch.equal(drawn[:1], random_rows(encoder, 1, known, torch.Generator().manual_seed(1)))
    set_rows(encoder, [known + 2, known], drawn[:2])
    assert torch.equal(rows_of(encoder, [known, known + 1, known + 2]), torch.stack([drawn[1], drawn[0] * 0, drawn[0]]))
    assert torch.equal(token_table(encoder).weight[:known], before)
    assert encoder(torch.tensor([[49406, known + 2, 49407]]))[0].isfinite().all()
    grow_table(encoder, 5)
    assert len(token_table(encoder).weight) == known + 3
