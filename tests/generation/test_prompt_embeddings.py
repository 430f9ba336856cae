"""Embedding files in prompts: token ids against the original's, states of the text encoders, XTI, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.generation.command import open_engine
from library.generation.embeddings import Words, add_embeddings, read_embeddings
from library.generation.engine import Engine
from library.generation.request import ImageRequest
from library.generation.text import PromptReader
from library.messages import UserError
from library.models.embedding_files import XTI_LAYERS, write_embedding
from library.models.embeddings import rows_of
from library.models.family import LoadedModel, family
from library.options.parser import parse, resolve

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "embeddings_generation.json").read_text(encoding="utf-8"))
WIDTH = 64


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain_file(folder: Path, word: str, count: int, seed: int = 1) -> str:
    write_embedding(folder / f"{word}.safetensors", {"emb_params": rows(count, seed)})
    return str(folder / f"{word}.safetensors")


def sdxl_file(folder: Path, word: str, count: int) -> str:
    write_embedding(folder / f"{word}.safetensors", {"clip_l": rows(count), "clip_g": rows(count, 2)})
    return str(folder / f"{word}.safetensors")


def xti_file(folder: Path, word: str, count: int, tables: Callable[[int], torch.Tensor] | None = None) -> str:
    tables = tables or (lambda number: rows(count, 100 + number))
    write_embedding(folder / f"{word}.safetensors", {layer: tables(number) for number, layer in enumerate(XTI_LAYERS)})
    return str(folder / f"{word}.safetensors")


@pytest.fixture
def sd(tiny_sd15: Path) -> LoadedModel:
    return family("sd").load(tiny_sd15)


class Tables:
    """Stands in for a model where token ids alone count."""

    def __init__(self, tokenizers: list[Any]) -> None:
        self.tokenizers = tokenizers
        self.text_encoders = [_encoder() for _ in tokenizers]


def _encoder() -> Any:
    from library.models.dimensions import TextDimensions
    from library.models.text_encoders import empty_text_encoder, text_config

    encoder = empty_text_encoder(text_config(TextDimensions(WIDTH, 1, 49408)))
    return encoder.to_empty(device="cpu")


def reader_of(name: str, plain: list[str], xti: list[str] | None = None) -> PromptReader:
    tokenizers = family(name).load_tokenizers()
    words = add_embeddings(Tables(tokenizers), read_embeddings(plain, xti))
    return PromptReader(tokenizers, 1, words)


def check(tokens: Any, case: dict[str, Any]) -> bool:
    if isinstance(case["tokens"], dict):
        wanted = case["tokens"]
        return len(tokens.ids) == wanted["length"] and (tokens.ids[:4], tokens.ids[-4:]) == (
            wanted["first"],
            wanted["last"],
        )
    return tokens.ids == case["tokens"] and tokens.weights == pytest.approx(case["weights"])


def test_prompts_of_the_original(tmp_path: Path) -> None:
    readers: dict[str, PromptReader] = {}
    for case in GOLDEN["sd"]:
        key = json.dumps(case["files"])
        if key not in readers:
            files = [plain_file(tmp_path, word, count) for word, count in case["files"]]
            readers[key] = reader_of("sd", files)
            assert dict(readers[key].words.vectors) == {ids[0]: ids for ids in case["ids"].values()}
    wrong = [c["prompt"] for c in GOLDEN["sd"] if not check(readers[json.dumps(c["files"])].tokens(c["prompt"])[0], c)]
    assert wrong == []
    assert len(readers) > 2


def test_sdxl_prompts_of_the_original(tmp_path: Path) -> None:
    counts = sorted({case["num_vectors"] for case in GOLDEN["sdxl"]})
    readers = {n: reader_of("sdxl", [sdxl_file(tmp_path, "myemb", n)]) for n in counts}
    wrong = [
        (case["prompt"], case["tokenizer"])
        for case in GOLDEN["sdxl"]
        if not check(readers[case["num_vectors"]].tokens(case["prompt"])[case["tokenizer"] - 1], case)
    ]
    assert wrong == []


def test_xti_prompts_of_the_original(tmp_path: Path) -> None:
    recorded = GOLDEN["xti"]
    reader = reader_of("sd", [], [xti_file(tmp_path, recorded["token_string"], recorded["num_vectors"])])
    ((word, layers),) = reader.words.layers.items()
    assert word == recorded["token_ids"][0]
    assert [one for ids in layers for one in ids] == recorded["layer_token_ids"]
    wrong = [
        (case["prompt"], case["layer"])
        for case in recorded["prompts"]
        if reader.tokens(case["prompt"], XTI_LAYERS.index(case["layer"]))[0].ids != case["tokens"]
    ]
    assert wrong == []
    # The original stops at the prompt without a layer ("without_layer"); here it is read as the first layer's.
    assert reader.tokens("a myxti")[0].ids[1:] == recorded["layer_token_ids"][:2]


def test_rows_are_those_of_the_file(sd: LoadedModel, tmp_path: Path) -> None:
    words = add_embeddings(
        sd, read_embeddings([plain_file(tmp_path, "zqone", 1), plain_file(tmp_path, "zqthree", 3, 5)], None)
    )
    (one,), three = (list(ids) for ids in words.vectors.values())
    assert torch.equal(rows_of(sd.text_encoders[0], [one]), rows(1))
    assert torch.equal(rows_of(sd.text_encoders[0], three), rows(3, 5))


def encode(model: LoadedModel, words: Words, prompt: str, **values: Any) -> torch.Tensor:
    draw = Engine(family("sd"), model, words=words)
    request = ImageRequest(
        **{"prompt": prompt, "width": 64, "height": 64, "steps": 2, "scale": 4.0, "seed": 7, **values}
    )
    return draw.encode([request]).hidden[0]


def test_a_word_counts_as_its_vectors(sd: LoadedModel, tmp_path: Path) -> None:
    words = add_embeddings(sd, read_embeddings([plain_file(tmp_path, "zqx", 2)]))
    states = encode(sd, words, "a (zqx:1.2) circle", negative_prompt="zqx")
    spelled = encode(sd, Words(), "a (zqx zqx1:1.2) circle", negative_prompt="zqx zqx1")
    assert torch.equal(states, spelled)


def test_xti_with_equal_layers_is_a_plain_embedding(sd: LoadedModel, tmp_path: Path) -> None:
    """Also with a negative scale, which stops the original, and with a plain embedding in the same prompt."""
    (tmp_path / "x").mkdir()
    plain, other = plain_file(tmp_path, "zqplain", 2), plain_file(tmp_path, "zqother", 3, 9)
    xti = xti_file(tmp_path / "x", "zqlayered", 2, lambda _: rows(2))
    words = add_embeddings(sd, read_embeddings([plain, other], [xti]))
    draw = Engine(family("sd"), sd, words=words, sampler="euler")

    def latents(word: str) -> torch.Tensor:
        request = ImageRequest(
            prompt=f"a {word} and zqother",
            negative_prompt=f"[{word}]",
            negative_scale=1.5,
            width=64,
            height=64,
            steps=2,
            scale=4.0,
            seed=7,
        )
        return draw.latents([request])

    assert draw.encode([ImageRequest(prompt="zqlayered", width=64, height=64, steps=1, scale=4.0, seed=1)]).hidden[
        0
    ].shape == (16, 2, 77, WIDTH)
    torch.testing.assert_close(latents("zqlayered"), latents("zqplain"), rtol=1e-4, atol=1e-4)


def test_xti_layers_reach_their_attention(sd: LoadedModel, tmp_path: Path) -> None:
    words = add_embeddings(sd, read_embeddings(None, [xti_file(tmp_path, "zqword", 1)]))
    states = encode(sd, words, "a zqword", scale=1.0)
    for number in (0, 6, 15):
        alone = family("sd").load(sd.source)
        (tmp_path / str(number)).mkdir(exist_ok=True)
        single = add_embeddings(
            alone, read_embeddings([_named(tmp_path / str(number), "zqword", rows(1, 100 + number))], None)
        )
        torch.testing.assert_close(states[number], encode(alone, single, "a zqword", scale=1.0))


def _named(folder: Path, word: str, table: torch.Tensor) -> str:
    write_embedding(folder / f"{word}.pt", {"emb_params": table})
    return str(folder / f"{word}.pt")


def test_a_prompt_without_the_xti_word_is_encoded_once(sd: LoadedModel, tmp_path: Path) -> None:
    words = add_embeddings(sd, read_embeddings(None, [xti_file(tmp_path, "zqlayered", 1)]))
    assert encode(sd, words, "a cat").shape == (2, 77, WIDTH)
    assert encode(sd, words, "a cat", negative_prompt="zqlayered").shape == (16, 2, 77, WIDTH)


def test_long_prompts_with_xti(sd: LoadedModel, tmp_path: Path) -> None:
    words = add_embeddings(sd, read_embeddings(None, [xti_file(tmp_path, "zqlayered", 2)]))
    draw = Engine(family("sd"), sd, words=words, max_chunks=2)
    request = ImageRequest(prompt="zqlayered " * 60, width=64, height=64, steps=1, scale=4.0, seed=1)
    assert draw.encode([request]).hidden[0].shape == (16, 2, 154, WIDTH)


def test_number_format_of_the_encoder(tiny_sd15: Path, tmp_path: Path) -> None:
    model = family("sd").load(tiny_sd15, dtype=torch.bfloat16)
    words = add_embeddings(model, read_embeddings([plain_file(tmp_path, "zqx", 1)]))
    assert rows_of(model.text_encoders[0], list(words.vectors)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: ([plain_file(f, "cat", 1)], None), "cat.safetensors: 'cat' is a token .* rename the file"),
        (lambda f: ([plain_file(f, "zqx", 1)] * 2, None), "'zqx' is a token of the tokenizer already"),
        (lambda f: ([sdxl_file(f, "zqx", 1)], None), "is an SDXL embedding"),
        (lambda f: ([xti_file(f, "zqx", 1)], None), "give it with --XTI_embeddings"),
        (lambda f: (None, [plain_file(f, "zqx", 1)]), "give it with --textual_inversion_embeddings"),
        (lambda f: ([str(f / "none.pt")], None), "does not exist"),
    ],
)
def test_refused(sd: LoadedModel, tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_embeddings(sd, read_embeddings(*make(tmp_path)))


def test_drawing_needs_both_sides_of_sdxl(tmp_path: Path) -> None:
    write_embedding(tmp_path / "zqx.pt", {"clip_g": rows(1)})
    with pytest.raises(UserError, match="has no clip_l"):
        add_embeddings(Tables(family("sdxl").load_tokenizers()), read_embeddings([str(tmp_path / "zqx.pt")]))


def test_the_script_reads_the_options(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    plain, xti = plain_file(tmp_path, "zqx", 2), xti_file(tmp_path / "x", "zqlayered", 1)
    argv = ["--ckpt", str(tiny_sd15), "--textual_inversion_embeddings", plain, "--XTI_embeddings", xti]
    options = resolve(parse("gen_img_diffusers.py", argv), "gen_img_diffusers.py")
    engine = open_engine(family("sd"), options.image_model, options.image)
    assert len(engine.reader.words.vectors) == len(engine.reader.words.layers) == 1
    request = ImageRequest(prompt="zqx zqlayered", width=64, height=64, steps=1, scale=4.0, seed=1)
    assert engine.facts(request)["embeddings"] == "zqx.safetensors, zqlayered.safetensors"
    assert engine.generate([request])[0].size == (64, 64)


def test_files_load_in_diffusers(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """`load_textual_inversion` reads what is written here, and its text encoder sees the same as ours."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from safetensors.torch import load_file

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None

        def __init__(self, model: LoadedModel) -> None:
            self.components = {}
            self.tokenizer, self.text_encoder = model.tokenizers[0], model.text_encoders[0]

    sdxl = load_file(sdxl_file(tmp_path, "zqboth", 2))
    write_embedding(tmp_path / "zqpickled.pt", {"emb_params": rows(2)})
    cases: list[tuple[str, Path, int, Any]] = [
        ("sd", tiny_sd15, 0, plain_file(tmp_path, "zqplain", 2)),
        ("sd", tiny_sd15, 0, str(tmp_path / "zqpickled.pt")),
        ("sdxl", tiny_sdxl, 0, sdxl["clip_l"]),
        ("sdxl", tiny_sdxl, 1, sdxl["clip_g"]),
    ]
    for name, path, index, source in cases:
        model = family(name).load(path)
        encoder, tokenizer = model.text_encoders[index], model.tokenizers[index]
        Pipeline(model).load_textual_inversion(source, token="zqx", tokenizer=tokenizer, text_encoder=encoder)
        ids = tokenizer.convert_tokens_to_ids(["zqx", "zqx_1"])
        assert ids == [49408, 49409]
        assert torch.equal(rows_of(encoder, ids), rows(2, index + 1))
