"""The engine on the tiny model: batches, guidance forms, decoding, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.generation.engine import Engine, pictures, vae_slice
from library.generation.request import ImageRequest
from library.messages import UserError
from library.models.family import LoadedModel, family
from library.models.vae import decode_latents
from library.models.vae_slicing import slice_convolutions, sliced_convolution


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> LoadedModel:
    return family("sd").load(tiny_sd15)


def engine(model: LoadedModel, **options: Any) -> Engine:
    return Engine(family("sd"), model, **{"sampler": "euler_a", **options})


def request(**values: Any) -> ImageRequest:
    return ImageRequest(**{"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "scale": 4.0, "seed": 7, **values})


def test_a_picture_does_not_depend_on_its_batch(model: LoadedModel) -> None:
    draw = engine(model)
    alone = draw.latents([request()])
    together = draw.latents([request(seed=8, prompt="a dog"), request()])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def test_texts_of_other_length_are_no_batch_mates(model: LoadedModel) -> None:
    draw = engine(model, max_chunks=3)
    long = " ".join(["cat"] * 80)
    assert draw.batch_key(request()) != draw.batch_key(request(prompt=long))
    assert draw.batch_key(request()) != draw.batch_key(request(negative_prompt=long))
    assert draw.batch_key(request(scale=1.0)) == draw.batch_key(request(scale=1.0, negative_prompt=long))
    assert draw.batch_key(request(prompt=long)) == draw.batch_key(request(prompt=long, negative_prompt=long))


def test_negative_scale_with_a_long_negative_prompt(model: LoadedModel) -> None:
    draw = engine(model, max_chunks=3)
    text = draw.encode([request(negative_prompt=" ".join(["cat"] * 80), negative_scale=2.0)])
    assert text.hidden[0].shape[:2] == (3, 154)


def test_equal_prompts_are_encoded_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = engine(model)
    rows = []
    encode = draw.family.encode_text
    monkeypatch.setattr(draw.family, "encode_text", lambda m, ids, **o: rows.append(len(ids[0])) or encode(m, ids, **o))
    assert draw.encode([request(), request(seed=8)]).hidden[0].shape[0] == 4
    assert rows == [2]


def test_text_is_cut_at_the_limit(model: LoadedModel) -> None:
    draw = engine(model)
    assert draw.encode([request(prompt=" ".join(["cat"] * 200))]).hidden[0].shape[1] == 77


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 102}, "width 102 .* use 104"),
        ({"height": 4}, "height 4 .* use 8"),
        ({"steps": 0}, "0 steps"),
        ({"strength": 1.5}, "strength"),
        ({"prompt": "a cat AND a dog"}, "AND"),
        ({"seed": 2**64}, "seed .* too large"),
        ({"sampler": "none such"}, "unknown sampler"),
    ],
)
def test_refusals(model: LoadedModel, values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine(model).generate([request(**values)])


def test_on_step_stops_a_batch(model: LoadedModel) -> None:
    seen: list[int] = []
    engine(model).latents([request(steps=5)], lambda index, timestep, latents: seen.append(index) or index == 1)
    assert seen == [0, 1]


@pytest.mark.parametrize(("wanted", "expected"), [(None, 5), (2.0, 2), (9.0, 5), (0.5, 2), (0.1, 1)])
def test_vae_slice(wanted: float | None, expected: int) -> None:
    assert vae_slice(5, wanted) == expected


def test_vae_in_parts_gives_the_same_pictures(model: LoadedModel) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = engine(model).decode(latents)
    torch.testing.assert_close(engine(model, vae_batch_size=2.0).decode(latents), whole)


def test_sliced_vae_equals_the_plain_one(tiny_sd15: Path, model: LoadedModel) -> None:
    latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        plain = decode_latents(model.vae, latents), model.vae.encode(images).latent_dist.mean
        sliced = family("sd").load(tiny_sd15).vae
        slice_convolutions(sliced, 3)
        torch.testing.assert_close(decode_latents(sliced, latents), plain[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sliced.encode(images).latent_dist.mean, plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (3, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("slices", [1, 2, 5, 99])
def test_sliced_convolution(kernel: int, stride: int, padding: int, slices: int) -> None:
    conv = torch.nn.Conv2d(2, 3, kernel, stride, padding)
    x = torch.randn(1, 2, 11, 7)
    torch.testing.assert_close(sliced_convolution(conv, x, slices=slices), conv(x))


def test_an_overflowing_vae_decodes_in_float32(model: LoadedModel) -> None:
    class Vae(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16), requires_grad=False)

        dtype = property(lambda self: self.weight.dtype)

        def decode(self, x: torch.Tensor) -> Any:
            return type("Output", (), {"sample": x[:, :3] * 6e4 / 6e4})

    vae = Vae()
    draw = engine(LoadedModel([], vae, model.unet, model.tokenizers))
    images = draw.decode(torch.full((1, 4, 8, 8), 1.0))
    assert torch.isfinite(images).all()
    assert vae.dtype == torch.float16


def test_pictures_are_clamped_and_rounded() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    image = pictures(values.expand(3, 1, 6)[None])[0]
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
