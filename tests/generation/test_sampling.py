"""Sample pictures while training: prompt files, names, and that a sample equals the script's picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from library.diffusion.samplers import make_sampler
from library.generation import sampling
from library.generation.engine import Engine
from library.generation.request import ImageRequest
from library.generation.sampling import SamplePrompt, draw_samples, read_prompts, sample_name
from library.messages import UserError
from library.models.family import LoadedModel, family
from library.training.samples import is_due

STAMP = "20240102030405"
# The prompt itself is no longer read as an option.
CURED_PROMPTS: dict[str, dict[str, Any]] = {
    "n whole line is negative": {"negative_prompt": None},
    "w 200 wide": {"width": 512},
}
# A subset's keys win, a table without subsets is one prompt, endings ignore case.
CURED_FILES = {9: [("one", 256)], 10: [("one", 512)], 13: [("a", 512)]}
# An unknown ending is refused; a missing file and a step interval of 0 are the training's to report.
REFUSED_FILES = {12}
NOT_READ = {14, 15}


def cases(golden: Path) -> list[dict]:
    return json.loads((golden / "training_samples.json").read_text(encoding="utf-8"))["cases"]


def write(case: dict, folder: Path) -> Path:
    path = folder / f"prompts{case['ext']}"
    path.write_text(case["prompt_file"], encoding="utf-8", newline="")
    return path


def as_recorded(prompt: SamplePrompt) -> dict:
    width, height = prompt.size(512, 8)
    return {
        "prompt": prompt.prompt,
        "width": width,
        "height": height,
        "num_inference_steps": prompt.steps,
        "guidance_scale": prompt.scale,
        "negative_prompt": prompt.negative_prompt,
    }


def test_golden_pictures(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "time_stamp", lambda: STAMP)
    failures = []
    for number, case in enumerate(cases(golden)):
        if number in NOT_READ or number in REFUSED_FILES:
            assert "error" in case
            continue
        prompts = read_prompts(write(case, tmp_path))
        if number in CURED_FILES:
            assert "error" in case
            assert [(prompt.prompt, prompt.size(512, 8)[0]) for prompt in prompts] == CURED_FILES[number]
            continue
        if not case["pictures"]:  # not due, or nothing in the file
            continue
        name = case["options"].get("output_name")
        for index, (prompt, picture, file) in enumerate(zip(prompts, case["pictures"], case["files"], strict=True)):
            expected = {key: value for key, value in picture.items() if key != "controlnet_image"}
            expected |= CURED_PROMPTS.get(picture["prompt"], {})
            if as_recorded(prompt) != expected:
                failures.append((number, as_recorded(prompt), expected))
            if (prompt.control_image is not None) != (picture["controlnet_image"] is not None):
                failures.append((number, prompt.control_image))
            if sample_name(name, case["epoch"], case["steps"], index, prompt.seed) != file:
                failures.append((number, file))
    assert not failures


def test_golden_samplers(golden: Path) -> None:
    """Classes and prediction as recorded; nothing is clipped, and a name that is no sampler is refused."""
    recorded = json.loads((golden / "training_samples.json").read_text(encoding="utf-8"))["samplers"]
    failures = []
    for key, case in recorded.items():
        name, _, v = key.partition("|")
        if name == "other":
            with pytest.raises(UserError, match="unknown sampler"):
                make_sampler(name)
            continue
        sampler = make_sampler(name, v_prediction=bool(v))
        if type(sampler).__name__ != case["class"] or sampler.config.get("clip_sample"):
            failures.append(key)
        if sampler.config["prediction_type"] != case["config"]["prediction_type"]:
            failures.append(key)
    assert not failures


def test_golden_times(golden: Path) -> None:
    missing_file, empty_file = 18, 16
    failures = []
    for number, case in enumerate(cases(golden)):
        options = {"sample_every_n_steps": 100, "sample_every_n_epochs": None, **case["options"]}
        due = is_due(SimpleNamespace(**options), case["epoch"], case["steps"])
        drew = bool(case.get("pictures")) or number in {missing_file, empty_file}
        # With an interval of 0 the original divides by it; here it means never.
        if due != drew and not ("error" in case and number != 15):
            failures.append(number)
    assert not failures


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "a"),
        ("a.toml", "[other]\n"),
        ("a.toml", "[prompt]\nwidth = 5\n"),
        ("a.toml", '[prompt]\nprompt = "a"\nwidth = "wide"\n'),
        ("a.toml", "[prompt"),
        ("a.json", "{}"),
        ("a.json", '[{"prompt": "a", "cfg": 3}]'),
        ("a.json", "[3]"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="prompt file"):
        read_prompts(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        read_prompts(tmp_path / "nothing.txt")


def test_sampler_per_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --ss euler_a --g 3\n", encoding="utf-8")
    assert read_prompts(path)[0].sampler == "euler_a"


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> LoadedModel:
    return family("sd").load(tiny_sd15)


def prompt(**values: Any) -> SamplePrompt:
    return SamplePrompt(**{"prompt": "a red circle", "width": 64, "height": 64, "steps": 3, "seed": 7, **values})


def test_a_sample_is_the_picture_of_the_script(model: LoadedModel, tmp_path: Path) -> None:
    drawn = draw_samples(family("sd"), model, [prompt(sampler="euler_a")], output_dir=tmp_path, step=3)
    request = ImageRequest(prompt="a red circle", width=64, height=64, steps=3, seed=7, sampler="euler_a")
    expected = Engine(family("sd"), model).generate([request])[0]
    with Image.open(drawn[0].path) as image:
        assert image.tobytes() == expected.tobytes()
        assert image.text["seed"] == "7"


def test_training_is_left_as_it_was(model: LoadedModel, tmp_path: Path) -> None:
    model.unet.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    draw_samples(family("sd"), model, [prompt(seed=None)], output_dir=tmp_path, step=3)
    assert torch.equal(torch.rand(1), expected)
    assert model.unet.training and not model.vae.training
    model.unet.eval()


def test_unseeded_prompts_get_a_new_seed_each_step(model: LoadedModel, tmp_path: Path) -> None:
    seeds = [
        draw_samples(family("sd"), model, [prompt(seed=None)], output_dir=tmp_path, step=step, seed=1)[0].seed
        for step in (1, 2, 1)
    ]
    assert seeds[0] == seeds[2] != seeds[1]


def test_a_prompt_that_cannot_be_drawn_does_not_stop_the_others(model: LoadedModel, tmp_path: Path) -> None:
    drawn = draw_samples(family("sd"), model, [prompt(sampler="none such"), prompt()], output_dir=tmp_path)
    assert [one.index for one in drawn] == [1]
    assert [path.name for path in (tmp_path / "sample").iterdir()] == [drawn[0].path.name]
