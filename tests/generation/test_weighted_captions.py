"""Captions with emphasis marks against the recorded text states of a stub encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm

from library.generation.text import PromptReader
from library.models.family import TextCondition


class StubTokenizer:
    """One token per character: its code point mod 29."""

    bos_token_id, eos_token_id = 30, 31

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) % 29 for character in text] for text in texts]}


class StubFamily:
    """hidden_states[l] = tables[l][ids] + positions; the last state of a clip skip passes the final norm."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tables = tensors["te.tables"]
        self.positions = tensors["te.positions"]

    def encode_text(self, encoders: list, ids: list, *, clip_skip: int | None, **_: object) -> TextCondition:
        states = self.tables[-(clip_skip or 1)][ids[0]] + self.positions
        return TextCondition([layer_norm(states, states.shape[-1:]).flatten(1, 2)])


def same_direction(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to one factor a row: the stub's states have mean 0, so their mean rule divides rounding by rounding."""
    cosine = torch.nn.functional.cosine_similarity(got.flatten(1), expected.flatten(1)).abs()
    return got.shape == expected.shape and bool((cosine > 1 - 1e-6).all())


def test_golden(golden: Path) -> None:
    cases = json.loads((golden / "training_text.json").read_text(encoding="utf-8"))["weighted"]
    tensors = load_file(golden / "training_text.safetensors")
    family = StubFamily(tensors)
    failures = []
    for case in cases:
        reader = PromptReader([StubTokenizer(case["pad_id"])], case["max_embeddings_multiples"], captions=True)
        tokens = [reader.tokens(caption)[0] for caption in case["captions"]]
        limit = 75 * case["max_embeddings_multiples"]
        if [t.ids for t in tokens] != [ids[:limit] for ids in case["tokens"]]:
            failures.append((case["name"], "tokens"))
        if [t.weights for t in tokens] != [weights[:limit] for weights in case["weights"]]:
            failures.append((case["name"], "weights"))
        chunks = reader.chunk_count(case["captions"])
        ids = torch.tensor(reader.encoder_ids(case["captions"], 0, chunks))
        states = family.encode_text([], [ids], clip_skip=case["clip_skip"]).hidden[0]
        weighted = states * torch.tensor(reader.weights(case["captions"], 0, chunks))[..., None]
        if not same_direction(weighted, tensors[f"{case['name']}.out"]):
            failures.append((case["name"], "states"))
    assert not failures
