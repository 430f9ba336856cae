"""Prompts against the recorded results of the original's parsers."""

from __future__ import annotations

import json
import random
from itertools import groupby
from pathlib import Path

import pytest

from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, load_tokenizer, text_ids
from library.prompts import chunks, dynamic
from library.prompts.emphasis import parse_attention
from library.prompts.line_options import PICTURE_ITEMS, SIZE_CONDITION_ITEMS, parse_line

# The original ends with a ValueError on a weight like 1.2.3; here it is text in ordinary brackets.
CURED_EMPHASIS = {"(a:1.2.3)": [("a:1.2.3", 1.1)]}
# The original ends with a ValueError; here the lower limit is cut, and a malformed count is 1 (with a warning).
CURED_GROUPS = {"{5$$a|b}": {"a, b", "b, a"}, "{-1$$a|b}": {"a", "b"}, "{1-$$a|b}": {"a", "b"}, "{-$$a|b}": {"a", "b"}}
FIELDS = {"negative": "negative_prompt", "network_muls": "network_multipliers", "seed": "seeds"}
SAME_NAME = """width height steps scale negative_scale strength clip_prompt original_height original_width
original_height_negative original_width_negative crop_top crop_left"""
FIELDS |= {name: name for name in SAME_NAME.split()}
KINDS = {"sd1": CLIP_L, "sd2": OPENCLIP_H, "sdxl_2": OPENCLIP_BIGG}


def read(golden: Path, name: str) -> dict:
    return json.loads((golden / name).read_text(encoding="utf-8"))


class TestEmphasis:
    def test_golden(self, golden: Path) -> None:
        failures = []
        for case in read(golden, "generation_emphasis.json")["cases"]:
            text = case["text"]
            for key, breaks in (("generation", True), ("sampling", False)):
                expected = case.get(key, case["generation"])
                expected = CURED_EMPHASIS[text] if isinstance(expected, str) else [(t, w) for t, w in expected]
                got = parse_attention(text, breaks=breaks)
                if got != expected:
                    failures.append((text, key, got, expected))
        assert not failures

    def test_never_empty(self) -> None:
        assert parse_attention("()") == [("", 1.0)]


class TestDynamicPrompts:
    def test_golden(self, golden: Path) -> None:
        failures = []
        for case in read(golden, "generation_dynamic_prompts.json")["cases"]:
            rng = random.Random(case["seed"])
            got = dynamic.expand(case["prompt"], case["count"], rng)
            if "error" in case:
                cured = len(got) == case["count"] and set(got) <= CURED_GROUPS[case["prompt"]]
                if not cured:
                    failures.append((case, got))
            elif got != case["result"] or rng.random() != case["next_random"]:
                failures.append((case, got))
        assert not failures


class TestPromptLines:
    @pytest.mark.parametrize("script", ["sd", "sdxl"])
    def test_golden(self, golden: Path, script: str) -> None:
        data = read(golden, "generation_prompt_lines.json")
        items = PICTURE_ITEMS if script == "sd" else (*PICTURE_ITEMS, *SIZE_CONDITION_ITEMS)
        base = {**data["base_sd" if script == "sd" else "base_xl"], "network_muls": None}
        failures = []
        for case in data["cases"]:
            changes = dict(case.get(script, case["sd"]))
            errors = changes.pop("parse_errors", [])
            parsed = parse_line(case["line"], items)
            expected = {**base, **changes}
            got = {**base, "prompt": parsed.prompt}
            for key, field in FIELDS.items():
                if field in parsed.values:
                    got[key] = parsed.values[field]
            if "seeds" in parsed.values:
                got["seed"] = parsed.values["seeds"][0]
            if got["network_muls"] is not None:
                got["network_muls"] = list(got["network_muls"])
            reported = [list(item) for item in parsed.not_understood]
            if got != expected or any(error not in reported for error in errors):
                failures.append((case["line"], got, expected, reported))
        assert not failures

    def test_says_what_it_did_not_understand(self) -> None:
        parsed = parse_line("a cat --width 64 --w 64 --w  32 --l 1.2.3 --sv 3")
        assert parsed.values == {"width": 64}
        assert [item for item, _ in parsed.not_understood] == ["width 64", "w  32", "l 1.2.3", "sv 3"]


class TestTokens:
    """Ids, weights and encoder inputs of long prompts."""

    @staticmethod
    def encode_runs(values: list) -> list:
        return [[value, len(list(run))] for value, run in groupby(values)]

    def test_golden(self, golden: Path) -> None:
        cases = read(golden, "generation_tokens.json")["cases"]
        assert KINDS.keys() == {case["family"] for case in cases}
        failures = []
        for number, case in enumerate(cases):
            for key, got in self.results(case).items():
                if got != case[key]:
                    failures.append((number, key, got, case[key]))
        assert not failures, failures[:3]

    def results(self, case: dict) -> dict:
        tokenizer = load_tokenizer(KINDS[case["family"]])
        special = chunks.SpecialIds(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        most = case["max_embeddings_multiples"] or 1
        sides = [case["prompts"], *([case["negatives"]] if case["negatives"] is not None else [])]
        sides[0] = [sub for prompt in sides[0] for sub in prompt.split(" AND ")]

        def tokenize(text: str) -> list[int]:
            return text_ids(tokenizer, [text])[0]

        read = [[chunks.prompt_tokens(text, tokenize, special, most) for text in side] for side in sides]
        count = chunks.chunk_count([len(prompt.ids) for side in read for prompt in side], most)
        padded = [[chunks.padded_ids(prompt.ids, special, count) for prompt in side] for side in read]
        inputs = [
            [chunks.encoder_rows(row, special)[chunk] for row in side] for side in padded for chunk in range(count)
        ]
        runs = self.encode_runs
        return {
            "truncated": any(prompt.truncated for side in read for prompt in side),
            "tokens": [[runs(prompt.ids) for prompt in side] for side in read],
            "weights_unpadded": [[runs(prompt.weights) for prompt in side] for side in read],
            "padded": [[runs(row) for row in side] for side in padded],
            "weights": [[runs(chunks.padded_weights(prompt.weights, count)) for prompt in side] for side in read],
            "encoder_inputs": [[runs(row) for row in rows] for rows in inputs],
        }
