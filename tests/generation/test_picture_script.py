"""The picture script from its door to its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.generation import output
from library.generation.checks import NOT_SUPPORTED_YET, check_options
from library.generation.command import find_model
from library.generation.output import OutputFolder, save_picture
from library.generation.request import ImageRequest
from library.generation.session import Session
from library.messages import UserError, log
from library.options.declare import options_of
from library.options.image import ImageConfig
from library.options.image_model import ImageModelConfig
from library.options.image_passes import ImagePassesConfig
from library.options.scripts import find_script
from library.prompts.files import read_prompt_lines

ROOT = Path(__file__).parents[2]
SCRIPT = "gen_img_diffusers.py"


def run_script(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / SCRIPT), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


SMALL = ("--W", 64, "--H", 64, "--steps", 2)


def test_draws_and_goes_on_after_a_bad_line(tiny_sd15: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 3\na dog --w 100\n(ein Vogel:1.2) --n häßlich --d 4\n", encoding="utf-8")
    out = tmp_path / "out"
    run = run_script(
        "--ckpt", tiny_sd15, *SMALL, "--from_file", prompts, "--outdir", out, "--sequential_file_name",
        "--max_embeddings_multiples", 2, "--opt_channels_last", "--vae_slices", 2,
    )  # fmt: skip
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "width 100 is not a multiple of 8" in run.stderr and "a dog" in run.stderr
    assert sorted(path.name for path in out.iterdir()) == ["im_000001.png", "im_000002.png"]
    with Image.open(out / "im_000002.png") as image:
        assert image.text["prompt"] == "(ein Vogel:1.2)"
        assert image.text["negative-prompt"] == "häßlich"
        assert image.text["model"] == tiny_sd15.name


def test_interactive(tiny_sd15: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_script(
        "--ckpt", tiny_sd15, *SMALL, "--interactive", "--no_preview", "--outdir", out, "--batch_size", 4,
        stdin="a cat --d 3\n\na dog --d 4\n",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sorted(path.name[-6:] for path in out.iterdir()) == ["_3.png", "_4.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "a"), "ckpt"),
        (("--ckpt", "none_such.safetensors", "--prompt", "a"), "none_such"),
        (("--ckpt", "x", "--from_file", "none_such.txt"), "none_such.txt"),
        (("--ckpt", "x", "--prompt", "a", "--image_path", "y"), "image to image is not supported yet"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    run = run_script(*arguments, "--outdir", tmp_path / "out")
    assert run.returncode == 1
    assert words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def configs(**values: Any) -> tuple[ImageConfig, ImageModelConfig, ImagePassesConfig]:
    built = []
    for kind in (ImageConfig, ImageModelConfig, ImagePassesConfig):
        known = {option.dest for option in options_of(kind)}
        built.append(kind(**{name: value for name, value in {"ckpt": "x", **values}.items() if name in known}))
    return tuple(built)  # type: ignore[return-value]


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED_YET))
def test_what_comes_later_is_refused(name: str) -> None:
    options = [*find_script(SCRIPT).options(), *find_script("sdxl_gen_img.py").options()]
    option = next(option for option in options if option.dest == name)
    value = ["x"] if option.nargs else option.value_type(1)
    with pytest.raises(UserError, match=f"--{name}: .* is not supported yet"):
        check_options(*configs(**{name: value}))


@pytest.mark.parametrize(
    "values",
    [{"batch_size": 0}, {"steps": 0}, {"strength": 2.0}, {"clip_skip": 0}, {"vae_batch_size": 0.0}, {"vae_slices": 0}],
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(values))}"):
        check_options(*configs(**values))


def test_tuning_without_its_feature_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.messages import log

    monkeypatch.setattr(log, "propagate", True)
    check_options(*configs(highres_fix_steps=5))
    assert "no effect: --highres_fix_steps" in caplog.text


def test_find_model(tmp_path: Path) -> None:
    (tmp_path / "model_a.safetensors").touch()
    (tmp_path / "model_b.safetensors").touch()
    assert find_model(str(tmp_path / "*_a.*")) == str(tmp_path / "model_a.safetensors")
    assert find_model("author/name") == "author/name"
    with pytest.raises(UserError, match="matches 2 files"):
        find_model(str(tmp_path / "*.safetensors"))


class TestOutputFolder:
    def test_numbers_go_on_after_earlier_runs(self, tmp_path: Path) -> None:
        (tmp_path / "im_000041.png").touch()
        folder = OutputFolder(tmp_path, sequential=True)
        assert [path.name for path in folder.names([5, 6])] == ["im_000042.png", "im_000043.png"]
        assert [path.name for path in folder.names([5])] == ["im_000044.png"]

    def test_equal_names_get_a_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output, "time_stamp", lambda: "20240102030405")
        folder = OutputFolder(tmp_path)
        names = []
        for _ in range(3):
            (path,) = folder.names([5])
            path.touch()
            names.append(path.name)
        assert names == [f"im_20240102030405_000_5{copy}.png" for copy in ("", "-1", "-2")]

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be made"):
            OutputFolder(tmp_path / "file" / "out")

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(AttributeError):
            save_picture(object(), tmp_path / "a.png", {})  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


class FailingEngine:
    """Cannot draw dogs."""

    def check(self, request: ImageRequest) -> None:
        pass

    def facts(self, request: ImageRequest) -> dict[str, str]:
        return {}

    def batch_key(self, request: ImageRequest) -> object:
        return None

    def generate(self, requests: list[ImageRequest]) -> list[Image.Image]:
        if any("dog" in request.prompt for request in requests):
            raise RuntimeError("out of memory")
        return [Image.new("RGB", (8, 8)) for _ in requests]


def test_a_failed_batch_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.propagate = True
    config = ImageConfig(outdir=str(tmp_path), batch_size=2)
    session = Session(config, FailingEngine(), ["a cat", "a dog", "a cat", "a cat"])
    with pytest.raises(UserError, match="2 pictures could not be drawn"):
        session.run()
    assert len(list(tmp_path.iterdir())) == 2
    assert "out of memory while drawing: try a smaller --batch_size" in caplog.text


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a cat \n\n  \na\x0cdog\n".encode())
    assert read_prompt_lines(path) == [" a cat ", "a", "dog"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompt_lines(path)
