"""Text and sampler trajectories of toy models against the recorded ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.diffusion.samplers import make_sampler, set_steps
from library.generation.denoise import Guidance, picture_generators, start_noise
from library.generation.passes import text_to_image
from library.generation.request import ImageRequest
from library.generation.text import PromptReader, encode_prompts
from library.models.family import TextCondition
from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, load_tokenizer

# Image to image and inpainting come with those passes.
LATER_KINDS = {"img", "img0", "img1", "inpaint"}
TOKENIZERS = {"sd1": CLIP_L, "sd2": OPENCLIP_H, "sdxl_2": OPENCLIP_BIGG}


class ToyFamily:
    """The toy encoder of the recorded cases: a sine of token id, position and feature."""

    def __init__(self, name: str) -> None:
        self.is_sdxl = name == "sdxl_2"

    def encode_text(
        self,
        text_encoders: list,
        input_ids: list[torch.Tensor],
        *,
        tokenizers: list,
        clip_skip: int | None,
        dtype: None,
    ) -> TextCondition:
        if self.is_sdxl:
            return self.encode_sdxl(input_ids[0], tokenizers[0].eos_token_id)
        hidden = []
        for rows in input_ids:
            states = self.last_hidden(rows)
            if clip_skip is not None and clip_skip > 1:
                states = states * 0.5 ** (clip_skip - 1) + 0.125
            hidden.append(states.flatten(1, 2))
        return TextCondition(hidden)

    def encode_sdxl(self, rows: torch.Tensor, eos_id: int) -> TextCondition:
        """Hidden state -2, and the state at the first chunk's first end token, projected."""
        states = self.last_hidden(rows)
        position = (rows[:, 0] == eos_id).int().argmax(dim=-1)
        projection = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 2, 0]])
        pooled = states[torch.arange(len(rows)), 0, position] @ projection.T
        return TextCondition([(states * 0.5).flatten(1, 2)], pooled)

    @staticmethod
    def last_hidden(rows: torch.Tensor) -> torch.Tensor:
        ids = (rows % 97)[..., None].float()
        feature = torch.arange(1, 5) * 0.1
        position = torch.arange(77)[:, None] * 0.01
        return torch.sin(feature * ids + position) + 0.3


def toy_text(family: str, texts: Sequence[str], most: int, clip_skip: int | None = None) -> TextCondition:
    reader = PromptReader([load_tokenizer(TOKENIZERS[family])], most)
    return encode_prompts(ToyFamily(family), [], reader, texts, clip_skip=clip_skip)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    return got.shape == expected.shape and (got - expected).abs().max().item() <= limit


class TestWeightedText:
    def test_golden(self, golden: Path) -> None:
        cases = json.loads((golden / "generation_tokens.json").read_text(encoding="utf-8"))["cases"]
        tensors = load_file(golden / "generation_tokens.safetensors")
        assert {case["family"] for case in cases} == set(TOKENIZERS)
        failures = []
        for case in cases:
            if case["tensors"] is None:
                continue
            prompts = [sub for prompt in case["prompts"] for sub in prompt.split(" AND ")]
            negatives = case["negatives"] or []
            text = toy_text(case["family"], [*prompts, *negatives], case["max_embeddings_multiples"] or 1)
            for states, suffix in ((text.hidden[0], ""), (text.pooled, "_pool")):
                if states is None:
                    continue
                if not close(states[: len(prompts)], tensors[f"{case['tensors']}.cond{suffix}"]):
                    failures.append((case["tensors"], "cond", suffix))
                if negatives and not close(states[len(prompts) :], tensors[f"{case['tensors']}.uncond{suffix}"]):
                    failures.append((case["tensors"], "uncond", suffix))
        assert not failures

    @pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
    @pytest.mark.parametrize(("length", "prompt"), [("short", "a (cat:1.3)"), ("long", " ".join(["cat"] * 80))])
    def test_clip_skip(self, golden: Path, clip_skip: int | None, length: str, prompt: str) -> None:
        tensors = load_file(golden / "generation_tokens.safetensors")
        states = toy_text("sd1", [prompt, "bad"], 2, clip_skip).hidden[0]
        assert close(states[:1], tensors[f"clip_skip.{clip_skip}.{length}.cond"])
        assert close(states[1:], tensors[f"clip_skip.{clip_skip}.{length}.uncond"])


def samplers(golden: Path) -> dict:
    return json.loads((golden / "generation_samplers.json").read_text(encoding="utf-8"))


class TestTrajectories:
    @staticmethod
    def draw(context: torch.Tensor, sampler: str, steps: int, v_prediction: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs of every call, latents after every call) of the toy U-Net."""
        inputs, latents = [], []

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            inputs.append(x[:1])
            text = context.mean(dim=(1, 2))[:, None, None, None]
            time = torch.sin(0.01 * t.float())[:, None, None, None]
            return 0.7 * torch.tanh(x) + 0.1 * x.roll(1, -1) + 0.05 * time + 0.1 * text

        request = ImageRequest(prompt="a (cat:1.2)", width=32, height=16, steps=steps, scale=5.0, seed=3)
        text_to_image(
            predict,
            [request],
            sampler_name=sampler,
            v_prediction=v_prediction,
            device="cpu",
            dtype=torch.float32,
            on_step=lambda i, t, x: latents.append(x),
        )
        return torch.stack(inputs), torch.stack(latents)

    def test_context(self, golden: Path) -> None:
        expected = load_file(golden / "generation_samplers.safetensors")["context"]
        assert close(toy_text("sd1", ["bad", "a (cat:1.2)"], 1).hidden[0], expected)

    def test_golden(self, golden: Path) -> None:
        tensors = load_file(golden / "generation_samplers.safetensors")
        names = {key.rpartition(".")[0] for key in tensors if key != "context"}
        later = {name for name in names if name.rpartition(".")[2] in LATER_KINDS}
        assert {name.rpartition(".")[2] for name in later} == LATER_KINDS
        failures = []
        for name in sorted(names - later):
            sampler, steps, prediction = name.rsplit(".", 2)
            inputs, latents = self.draw(tensors["context"], sampler, int(steps), prediction == "v")
            for key, got in (("model_input", inputs), ("latents", latents)):
                expected = tensors[f"{name}.{key}"]
                error = (got - expected).abs().max() / expected.abs().max() if got.shape == expected.shape else 9
                if error > 1e-5:
                    failures.append((name, key, float(error)))
        assert not failures

    def test_timesteps(self, golden: Path) -> None:
        data = samplers(golden)
        runs = {}
        for sampler, cases in data["table"].items():
            for name, case in cases.items():
                if name.rpartition(".")[2] not in LATER_KINDS:
                    runs[name] = (sampler, int(name.rsplit(".", 2)[1]), case)
        runs |= {f"{name}.30": (name, 30, case) for name, case in data["thirty"].items()}
        failures = []
        for name, (sampler, steps, case) in runs.items():
            if "error" in case:  # pndm with one step: refused with a message of our own
                continue
            scheduler = make_sampler(sampler)
            set_steps(scheduler, steps)
            expected = torch.tensor(case["timesteps"], dtype=torch.float64)
            if not torch.allclose(scheduler.timesteps.double(), expected, rtol=1e-6, atol=1e-3):
                failures.append((name, scheduler.timesteps, expected))
            sigma = float(scheduler.init_noise_sigma)
            if abs(sigma - case.get("init_noise_sigma", sigma)) > 1e-5 * sigma:
                failures.append((name, sigma, case["init_noise_sigma"]))
        assert not failures

    def test_aliases(self, golden: Path) -> None:
        for alias, name in samplers(golden)["aliases"].items():
            assert type(make_sampler(alias)) is type(make_sampler(name))


def test_three_part_guidance() -> None:
    output = torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1)
    guided = Guidance(4.0, 2.0).combine(output)
    assert guided.item() == 100.0 + 4.0 * (10.0 - 100.0) - 2.0 * (1.0 - 100.0)


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a"])
def test_pictures_do_not_depend_on_batch_mates(sampler: str) -> None:
    def draw(seeds: list[int]) -> torch.Tensor:
        requests = [ImageRequest(prompt="", width=32, height=16, steps=4, scale=1.0, seed=seed) for seed in seeds]
        return text_to_image(
            lambda x, t: 0.7 * torch.tanh(x),
            requests,
            sampler_name=sampler,
            v_prediction=False,
            device="cpu",
            dtype=torch.float32,
        )

    torch.testing.assert_close(draw([5, 7])[1:], draw([7]))


def test_start_noise_leaves_out_what_the_original_draws_in_vain() -> None:
    seed, steps = 3, 5
    plain = torch.Generator().manual_seed(seed)
    draws = [torch.randn(4, 2, 4, generator=plain) for _ in range(2 * steps + 2)]
    generators = picture_generators([seed], "cpu")
    start = start_noise(generators, (4, 2, 4), torch.float32, sampler="dpm_2_a", steps=steps)
    assert torch.equal(start[0], draws[0])
    assert torch.equal(torch.randn(4, 2, 4, generator=generators[0]), draws[2 * steps + 1])
