"""Weighted captions through the old functions, with the stub encoder of the recorded cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, layer_norm

from library import custom_train_functions as functions
from library.training import classic_text
from tests.conftest import GOLDEN, load_json

DATA = load_json(GOLDEN / "training_text.json")


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "training_text.safetensors")


class StubTokenizer:
    """One token per character: its code point mod 29."""

    bos_token_id, eos_token_id = 30, 31

    def __init__(self, pad_token_id=31):
        self.pad_token_id = pad_token_id

    def __call__(self, text):
        return SimpleNamespace(input_ids=[30, *(ord(character) % 29 for character in text), 31])


class StubEncoder(torch.nn.Module):
    """hidden_states[l] = tables[l][ids] + positions."""

    def __init__(self, tensors):
        super().__init__()
        self.tables, self.positions = tensors["te.tables"], tensors["te.positions"]
        self.text_model = torch.nn.Module()
        self.text_model.final_layer_norm = torch.nn.LayerNorm(self.tables.shape[-1], elementwise_affine=False)

    def forward(self, ids, output_hidden_states=False, return_dict=None):
        states = [table[ids] + self.positions for table in self.tables]
        last = layer_norm(states[-1], states[-1].shape[-1:])
        return {"hidden_states": states} if output_hidden_states else (last,)


@pytest.fixture
def no_mean_rule(monkeypatch):
    """Weights alone: the stub's states have mean 0, so the rule that keeps a caption's mean divides 0 by 0."""
    monkeypatch.setattr(classic_text, "apply_weights", lambda hidden, weights: hidden * weights[..., None])


@pytest.mark.parametrize("case", DATA["weighted"], ids=lambda c: c["name"])
def test_recorded_cases(case, tensors, no_mean_rule):
    tokenizer = StubTokenizer(case["pad_id"])
    limit = 75 * case["max_embeddings_multiples"]
    tokens, weights = functions.get_prompts_with_weights(tokenizer, case["captions"], limit)
    assert tokens == [row[:limit] for row in case["tokens"]]
    assert weights == [pytest.approx(row[:limit]) for row in case["weights"]]
    states = functions.get_weighted_text_embeddings(
        tokenizer,
        StubEncoder(tensors),
        case["captions"],
        "cpu",
        max_embeddings_multiples=case["max_embeddings_multiples"],
        clip_skip=case["clip_skip"],
    )
    expected = tensors[f"{case['name']}.out"]
    assert states.shape == expected.shape
    # equal up to the factor of the mean rule
    assert (cosine_similarity(states.flatten(1), expected.flatten(1)).abs() > 1 - 1e-6).all()


@pytest.mark.parametrize("index", range(len(DATA["attention"])))
def test_emphasis(index):
    case = DATA["attention"][index]
    if "error" in case:
        # a number that is none ends the original; here it is literal text
        assert "1.2.3" in "".join(text for text, _ in functions.parse_prompt_attention(case["text"]))
        return
    assert functions.parse_prompt_attention(case["text"]) == [
        [text, pytest.approx(weight)] for text, weight in case["result"]
    ]


def test_inner_begin_and_end_can_be_left_out(tensors):
    tokenizer, encoder = StubTokenizer(), StubEncoder(tensors)
    long = "(abc:1.5) " * 20
    both = [
        functions.get_weighted_text_embeddings(tokenizer, encoder, [long, "dog"], "cpu", no_boseos_middle=flag)
        for flag in (False, True)
    ]
    chunks = both[0].shape[1] // 77
    assert chunks > 1
    assert both[1].shape[1] == 75 * chunks + 2


@pytest.mark.parametrize("pad", [31, 0])
@pytest.mark.parametrize("no_boseos_middle", [False, True])
def test_padding_and_encoding_piece_by_piece_equal_the_whole(tensors, no_mean_rule, pad, no_boseos_middle):
    tokenizer, encoder = StubTokenizer(pad), StubEncoder(tensors)
    captions = ["a (long:1.2) caption " * 7, "dog"]
    tokens, weights = functions.get_prompts_with_weights(tokenizer, captions, 75 * 3)
    length = 75 * 2 + 2
    rows, scale = functions.pad_tokens_and_weights(tokens, weights, length, 30, 31, no_boseos_middle)
    states = functions.get_unweighted_text_embeddings(
        tokenizer, encoder, torch.tensor(rows), 77, None, 31, pad, no_boseos_middle
    )
    assert states.shape[:2] == (2, length if no_boseos_middle else 77 * 2) == torch.tensor(scale).shape
    weighted = states * torch.tensor(scale)[..., None]
    whole = functions.get_weighted_text_embeddings(
        tokenizer, encoder, captions, "cpu", no_boseos_middle=no_boseos_middle
    )
    assert (cosine_similarity(weighted.flatten(1), whole.flatten(1)).abs() > 1 - 1e-6).all()
