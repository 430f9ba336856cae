"""The page about a training, made from a record, and how a browser shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.messages import UserError
from library.options.parser import parse
from library.training.run_history import History, smoothed
from library.training.run_page import make_page, speed_hints, write_pages
from library.training.run_pictures import evenly
from tests.browser import console_of, find_browser, measure
from tests.test_page import Reader
from tools.report_run import SCRIPT, report

RUN = {
    "kind": "run",
    "name": "my <lora>",
    "script": "train_network.py",
    "from_step": 0,
    "max_steps": 60,
    "epochs": 3,
    "updates_per_epoch": 20,
    "pictures_per_update": 2,
    "processes": 1,
    "device": "NVIDIA H100 80GB HBM3",
    "peak_flops": 989e12,
    "versions": {"torch": "2.13"},
    "trained": ["unet: 1,000 parameters in 4 tensors, rate 0.001"],
    "length": ["60 steps in 3 epochs"],
    "data": ["data set 1: a folder with a name that is so long that a telephone could not show it in one line at all"],
    "settings": ["model: model.safetensors, SD 1.x, noise prediction"],
    "options": {"learning_rate": 0.001, "network_args": ["conv_dim=4", "conv_alpha=1"], "cache_latents": True},
    "ema": {"decay": 0.999, "start": 0},
}


def step(number: int, **changes: Any) -> dict[str, Any]:
    loss = 0.2 / number**0.3 + 0.05 * math.sin(7 * number)
    bands = [[loss * (5 - b), 1.0] if b == number % 5 else [0.0, 0.0] for b in range(5)]
    line = {"kind": "step", "step": number, "epoch": (number - 1) // 20 + 1, "loss": loss, "average": loss}
    line |= {"rates": {"unet": 1e-3 * (1 - number / 61), "text_encoder": 5e-4}, "norm": 0.3, "bands": bands}
    return line | {"seconds": 0.05, "waited": 0.02, "memory": 8e9, "flops": 2e12} | changes


def validation(number: int) -> dict[str, Any]:
    loss = 0.15 + (number - 30) ** 2 / 9000
    timesteps = {str(t): loss * 1000 / t for t in (200, 400, 600, 800)}
    return {"kind": "validation", "step": number, "epoch": 1, "loss": loss, "timesteps": timesteps, "ema": loss - 0.01}


def write_record(folder: Path, *, name: str = "x", end: dict | None = None, steps: int = 60) -> Path:
    """A record of a run with everything in it, and its sample pictures."""
    (folder / "sample").mkdir(exist_ok=True)
    lines = [RUN, *(step(n) for n in range(1, steps + 1)), *(validation(n) for n in range(0, steps + 1, 10))]
    for average in (False, True):
        for n in (0, steps):
            path = f"sample/{average}_{n}.png"
            Image.new("RGB", (300, 200), (n, 90, 200 * average)).save(folder / path)
            shown = {"index": 0, "prompt": "a <red> heart", "seed": 1, "ema": average}
            lines.append({"kind": "sample", "step": n, "path": path, **shown})
    lines += [
        {"kind": "sample", "step": 5, "path": "sample/gone.png", "index": 1, "prompt": "p", "seed": 1, "ema": False}
    ]
    lines += [{"kind": "notice", "step": 60, "text": "the validation loss rises since step 30"}]
    lines += [{"kind": "save", "step": step, "path": f"x{step}.safetensors"} for step in (25, 60)]
    lines += [{**RUN, "from_step": 40}, {"kind": "end", "problem": None} if end is None else end]
    path = folder / f"{name}-metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    reader = Reader(make_page(write_record(tmp_path)))
    text = reader.text
    for part in (
        *("Training of my <lora>", "60 of 60 steps, train_network.py, on NVIDIA H100 80GB HBM3", "the run finished"),
        *("the validation loss rises since step 30", "Training loss", "timesteps 800-999", "Validation loss"),
        *("validation of the moving average", "timestep 200", "Learning rates", "text_encoder", "Pictures a second"),
        *("Norm of the gradients before clipping", "a <red> heart", "step 60, seed 1", "unet: 1,000 parameters"),
        *(
            "decay 0.999",
            "Resumed at steps 40",
            "--network_args",
            "conv_dim=4 conv_alpha=1",
            "x25.safetensors (step 25)",
        ),
        *("peak memory", "8.0 GB", "0.15 at step 30", "40.0%"),
    ):
        assert part in text, part
    assert "8.1%" in text, "40 pictures a second of 2 TFLOP each, of 989 TFLOP"
    assert len(reader.all("img")) == 4, "of the pictures that are there"
    assert not [tag for tag, _ in reader.tags if tag == "script"]


def test_hints_name_the_option_to_turn() -> None:
    def hints(**options: Any) -> str:
        return " ".join(speed_hints(History([{**RUN, "options": options}, step(1)])))

    assert "40% of the time the loop waited" in hints()
    assert "--max_data_loader_n_workers`, which is 0" in hints(max_data_loader_n_workers=0)
    assert "`--cache_latents` encodes every picture once" in hints()
    assert "--persistent_data_loader_workers" in hints(cache_latents=True)
    assert "faster disk" in hints(cache_latents=True, persistent_data_loader_workers=True)
    assert "8.1% of what it can" in hints() and "--train_batch_size" in hints()
    assert "--gradient_checkpointing_interval" in hints(gradient_checkpointing=True)
    busy = History([{**RUN, "options": {}}, step(1, waited=0.0, flops=20e12)])
    assert speed_hints(busy) == []


def test_a_run_that_goes_on_and_one_that_failed(tmp_path: Path) -> None:
    path = write_record(tmp_path, end={"kind": "step", **step(61)})
    assert "still going, or it was killed" in make_page(path)
    assert "disk full" in make_page(write_record(tmp_path, end={"kind": "end", "problem": "disk full"}))


def test_a_run_without_a_step(tmp_path: Path) -> None:
    path = tmp_path / "x-metrics.jsonl"
    path.write_text(json.dumps({**RUN, "ema": None}) + "\n", encoding="utf-8")
    assert "0 of 60 steps" in make_page(path)


def test_smoothing() -> None:
    assert smoothed([(n, float(n)) for n in range(1, 5)]) == [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5)]
    assert [y for _, y in smoothed([(n, 1.0) for n in range(100)])] == pytest.approx([1.0] * 100)
    band = History([RUN, *(step(n) for n in range(1, 61))]).bands()[3]
    assert len(band) == 12 and {at % 5 for at, _ in band} == {3}


@pytest.mark.parametrize(("count", "most"), [(3, 10), (25, 10), (10, 10)])
def test_chosen_pictures(count: int, most: int) -> None:
    chosen = evenly(list(range(count)), most)
    assert chosen[0] == 0 and chosen[-1] == count - 1
    assert len(chosen) == min(count, most) == len(set(chosen))


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, name="a")
    write_record(tmp_path, name="b")
    report(parse(SCRIPT, [str(tmp_path)]))
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}-report.html") for name in "ab"]
    assert (tmp_path / "b-report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    report(parse(SCRIPT, [str(tmp_path / "a-metrics.jsonl"), "--page", str(tmp_path / "page.html")]))
    assert (tmp_path / "page.html").exists()
    with pytest.raises(UserError, match="has several records"):
        write_pages(tmp_path, tmp_path / "one.html")
    with pytest.raises(UserError, match="holds no record of a training"):
        write_pages(tmp_path / "sample")
    (tmp_path / "c-metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no training"):
        write_pages(tmp_path / "c-metrics.jsonl")
    assert not (tmp_path / "c-report.html").exists()


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(make_page(write_record(tmp_path)), encoding="utf-8")
    assert console_of(page, tmp_path) == [], "an error, or a request that the policy refused"
    for width, found in measure(page, tmp_path, 400, 1400).items():
        assert found["page"] <= width and not found["wide"], f"at {width} pixels: {found['wide'][:5]}"
        assert found["console"] == [] and found["loaded"] == [] and not found["broken"] and not found["small"]
        assert found["images"] == 4
        assert found["headings"] == [
            *("Outcome", "Loss", "Learning rates and gradients", "Speed and memory", "Sample pictures"),
            *("What was trained", "Pictures and captions", "Settings"),
        ]
