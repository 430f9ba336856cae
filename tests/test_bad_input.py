"""Bad input through the real door: one line with the thing and the remedy, exit code 1, nothing written, nothing lost.

Runs of `train_network.py` and `gen_img_diffusers.py` in this process with another command line, a few in their own
process. What stops a training in the middle (non-finite loss, Ctrl-C) stands in `training/test_faults.py`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
import train_network
from library import messages
from library.messages import UserError
from library.models import checkpoint_writer
from library.runtime import files

ROOT = Path(__file__).parent.parent
TRAIN, DRAW = train_network, gen_img_diffusers
BOTH = pytest.mark.parametrize("script", [TRAIN, DRAW], ids=["train", "draw"])
EARLIER = {"x.safetensors": b"an earlier network", "deep/er/picture.png": b"an earlier picture"}


class Door:
    """Runs scripts and looks at what they say and leave behind.

    Attributes:
        folder: of the test; output: where earlier files lie.
    """

    def __init__(self, folder: Path, model: Path, monkeypatch: Any, capsys: Any) -> None:
        self.folder, self.model, self.monkeypatch, self.capsys = folder, model, monkeypatch, capsys
        self.output = folder / "out"
        for name, content in EARLIER.items():
            (self.output / name).parent.mkdir(parents=True, exist_ok=True)
            (self.output / name).write_bytes(content)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def pictures(self, name: str = "data", size: int = 64) -> Path:
        """A folder for `--train_data_dir` with two pictures."""
        folder = self.folder / name / "1_thing"
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = np.random.RandomState(i).randint(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder.parent

    def command(self, script: ModuleType, options: tuple[Any, ...], model: Any, data: Any) -> list[str]:
        if script is DRAW:
            given = ["--ckpt", model, "--prompt", "a cat", "--outdir", self.output, "--W", 64, "--H", 64, "--steps", 1]
            return [str(one) for one in [*given, *options]]
        source = [] if "--dataset_config" in options else ["--train_data_dir", data or self.pictures()]
        given = ["--pretrained_model_name_or_path", model, *source, "--resolution", "64", "--seed", 1]
        given += ["--network_module", "networks.lora", "--network_dim", 2, "--max_data_loader_n_workers", 0]
        given += ["--output_dir", self.output, "--output_name", "x", "--max_train_steps", 2]
        return [str(one) for one in [*given, *options]]

    def run(self, script: ModuleType, *options: Any, model: Any = None, data: Any = None) -> tuple[int, str]:
        """(exit code, standard error) of a run in this process."""
        argv = self.command(script, options, model or self.model, data)
        self.monkeypatch.setattr(sys, "argv", [script.SCRIPT, *argv])
        self.capsys.readouterr()
        code = 0
        try:
            messages.run(script.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, self.capsys.readouterr().err

    def refuses(self, script: ModuleType, *options: Any, says: str, model: Any = None, data: Any = None) -> str:
        """The one line of a run that must stop; `says` are words of it, with `{}` for the test's folder."""
        before = contents(self.output)
        with remembered(self.monkeypatch) as raised:
            code, text = self.run(script, *options, model=model, data=data)
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        assert (code, len(lines)) == (1, 1), text
        assert text.splitlines()[-1] == lines[0], "something is said after it"
        assert "Traceback" not in text
        for words in says.split("|"):
            assert words.replace("{}", str(self.folder)) in lines[0]
        assert raised[-1].remedy or "did you mean" in lines[0] or "must be" in lines[0], f"no remedy: {lines[0]}"
        assert contents(self.output) == before
        return lines[0]


class remembered:
    """Context manager: the UserErrors that are made inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __enter__(self) -> list[UserError]:
        made: list[UserError] = []
        create = UserError.__init__

        def init(error: UserError, *args: Any, **kwargs: Any) -> None:
            create(error, *args, **kwargs)
            made.append(error)

        self.monkeypatch.setattr(UserError, "__init__", init)
        return made

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.undo()


def contents(folder: Path) -> dict[str, bytes | None]:
    """What lies in the folder, the diary of a failed run (its record and page) aside."""
    paths = [p for p in sorted(folder.rglob("*")) if p.name not in ("x-metrics.jsonl", "x-report.html")]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture
def door(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Iterator[Door]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(messages, "_said", set())
    yield Door(tmp_path, tiny_sd15, monkeypatch, capsys)
    messages.set_up()


# Models


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickle_of(content: Any, path: Path) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


MODELS: dict[str, tuple[Callable[[Door], Any], str]] = {
    "missing file": (lambda d: d.folder / "no.safetensors", "{}/no.safetensors does not exist|check the path"),
    "missing folder": (lambda d: "no/such/folder", "no/such/folder does not exist"),
    "unknown on the hub": (lambda d: "someone/no-model", "someone/no-model|hub"),
    "cut in the tensors": (
        lambda d: d.file("m.safetensors", d.model.read_bytes()[:500_000]),
        "m.safetensors|truncated",
    ),
    "cut in the header": (lambda d: d.file("m.safetensors", d.model.read_bytes()[:100]), "m.safetensors|truncated"),
    "empty file": (lambda d: d.file("m.safetensors", b""), "m.safetensors is empty"),
    "web page": (lambda d: d.file("m.ckpt", "<!DOCTYPE html><html>not found</html>"), "m.ckpt is not a model file"),
    "foreign tensors": (
        lambda d: foreign(d, "m.safetensors", {"a": (2, 2)}),
        "m.safetensors|no Stable Diffusion model",
    ),
    "network": (lambda d: foreign(d, "m.safetensors", {"lora_unet_x.lora_down.weight": (2, 2)}), "is a LoRA"),
    "pickle that runs code": (
        lambda d: d.file("m.ckpt", pickle_of({"state_dict": RunsCode(d.folder / "ran")}, d.folder / "p")),
        "m.ckpt wants to run code|use a .safetensors version",
    ),
    "pickle of something else": (lambda d: d.file("m.ckpt", pickle.dumps([1, 2])), "m.ckpt|model"),
    "empty folder": (lambda d: d.file("model/readme", "").parent, "{}/model is no model folder"),
    "incomplete folder": (
        lambda d: d.file("model/model_index.json", '{"_class_name": "StableDiffusionPipeline"}').parent,
        "{}/model has no subfolder unet",
    ),
}


def foreign(door: Door, name: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, str(door.folder / name))
    return door.folder / name


@BOTH
@pytest.mark.parametrize("case", MODELS)
def test_model(door: Door, script: ModuleType, case: str) -> None:
    make, says = MODELS[case]
    door.refuses(script, model=make(door), says=says)
    assert not (door.folder / "ran").exists()


@BOTH
def test_model_of_another_family(door: Door, script: ModuleType, tiny_sd21: Path, tiny_sdxl: Path) -> None:
    door.refuses(script, model=tiny_sd21, data=door.pictures("d1"), says=f"{tiny_sd21}|Stable Diffusion 2.x|give --v2")
    door.refuses(script, model=tiny_sdxl, data=door.folder / "d1", says=f"{tiny_sdxl}|Stable Diffusion XL|sdxl_")
    door.refuses(script, "--v2", data=door.folder / "d1", says="Stable Diffusion 1.x|leave out --v2")


@BOTH
def test_vae(door: Door, script: ModuleType) -> None:
    data = door.pictures()
    door.refuses(script, "--vae", "no.pt", data=data, says="VAE no.pt does not exist")
    cut = door.file("vae.safetensors", door.model.read_bytes()[:5000])
    door.refuses(script, "--vae", cut, data=data, says="vae.safetensors is truncated")
    other = foreign(door, "other.safetensors", {"a": (1,)})
    door.refuses(script, "--vae", other, data=data, says="other.safetensors is no VAE")


# Data


def test_no_data_folder(door: Door) -> None:
    door.refuses(TRAIN, data=door.folder / "gone", says="--train_data_dir {}/gone does not exist")
    door.refuses(TRAIN, data=door.model, says="is a file, not a folder")
    door.refuses(TRAIN, "--reg_data_dir", "gone", says="--reg_data_dir gone does not exist")


def test_no_pictures(door: Door) -> None:
    (door.folder / "empty").mkdir()
    door.refuses(TRAIN, data=door.folder / "empty", says="{}/empty holds no pictures")
    (door.folder / "bare" / "1_a").mkdir(parents=True)
    door.refuses(TRAIN, data=door.folder / "bare", says="no pictures found in|1_a")


@pytest.mark.parametrize("cached", [(), ("--cache_latents",), ("--cache_latents_to_disk",)], ids=["", "memory", "disk"])
@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_corrupt_picture(door: Door, damage: str, cached: tuple[str, ...]) -> None:
    data = door.pictures()
    picture = data / "1_thing" / "1.png"
    picture.write_bytes({"cut": picture.read_bytes()[:400], "other": b"no picture", "empty": b""}[damage])
    door.refuses(TRAIN, *cached, data=data, says="1_thing/1.png|replace or remove the file")


def test_several_bad_pictures_and_keys_are_a_line_each(door: Door) -> None:
    """A head that counts them, then each in a line of its own; nothing is said after that."""
    data = door.pictures()
    for name in ("8.png", "9.jpg"):
        (data / "1_thing" / name).write_bytes(b"no picture")
    file = door.file("data.toml", GOOD.format(data) + "numrepeats = 1\nflip_aug = 3\n")
    for given, head, places in (
        ((), "error: cannot read 2 files: replace or remove them", ("1_thing/8.png (", "1_thing/9.jpg (")),
        (("--dataset_config", file), f"error: {file} has 2 problems", ("line 5: datasets[0]", "line 6: datasets[0]")),
    ):
        code, text = door.run(TRAIN, *given, data=data)
        lines = text.splitlines()[-3:]
        assert code == 1 and lines[0].startswith(head) and "Traceback" not in text
        assert all(line.startswith("  ") and place in line for line, place in zip(lines[1:], places, strict=True))


def test_no_resolution(door: Door) -> None:
    door.refuses(TRAIN, "--resolution", "many", says="--resolution many cannot be read|768,512")


# Data-set files

GOOD = """[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "{}"
"""
DATASET_FILES = {
    "syntax": (GOOD + "[[[", "data.toml is no valid TOML|line 5|mend the line"),
    "unknown key of a subset": (GOOD + 'image_dirr = "x"\n', "line 5|datasets[0].subsets[0].image_dirr|image_dir?"),
    "unknown general key": (
        "[general]\nshufle_caption = true\n" + GOOD,
        "line 2|general.shufle_caption|shuffle_caption?",
    ),
    "unknown table": ("[genera]\n" + GOOD, "line 1|genera|did you mean general?"),
    "text for a number": (GOOD + 'num_repeats = "three"\n', "line 5|num_repeats|must be a whole number"),
    "text for a switch": ('[general]\nenable_bucket = "yes"\n' + GOOD, "line 2|enable_bucket|true or false"),
    "empty": ("", "no datasets in|data.toml|[[datasets]]"),
    "nothing but general": ("[general]\nshuffle_caption = true\n", "no datasets in|data.toml"),
    "not UTF-8": (b"\x00\xff\xfe" * 9, "data.toml is not UTF-8"),
    "missing folder": (GOOD.replace("{}", "gone"), "no pictures found in gone"),
    "a training file": (
        'pretrained_model_name_or_path = "m"\nnetwork_module = "networks.lora"\n',
        "data.toml holds training options|--config_file",
    ),
    "a training file in groups": (
        '[model]\npretrained_model_name_or_path = "m"\n[optimizer]\nlearning_rate = 1e-4\n',
        "data.toml holds training options (pretrained_model_name_or_path, learning_rate)|--config_file",
    ),
}


@pytest.mark.parametrize("case", DATASET_FILES)
def test_dataset_file(door: Door, case: str) -> None:
    content, says = DATASET_FILES[case]
    if isinstance(content, str):
        content = content.replace("{}", (door.pictures() / "1_thing").as_posix())
    door.refuses(TRAIN, "--dataset_config", door.file("data.toml", content), says=says)


def test_no_dataset_file(door: Door) -> None:
    door.refuses(TRAIN, "--dataset_config", "gone.toml", says="--dataset_config gone.toml: no such file")


# Training files

CONFIG_FILES = {
    "syntax": ("a = = b", "run.toml is no valid TOML|line 1"),
    "text for a number": ('learning_rate = "fast"\n', "run.toml: learning_rate = 'fast' is not a number"),
    "share for a whole number": ("gradient_accumulation_steps = 1.5\n", "run.toml|gradient_accumulation_steps = 1.5"),
    "text for a switch": ('enable_bucket = "yes"\n', "run.toml: enable_bucket = 'yes' is not true or false"),
    "list for a text": ('logging_dir = ["a"]\n', "run.toml|logging_dir"),
    "no choice": ('mixed_precision = "fp17"\n', "run.toml: mixed_precision = 'fp17'|fp16"),
    "not UTF-8": (b"\xff\xfe\x00", "run.toml is not UTF-8"),
    "a data-set file": (GOOD, "run.toml is a data-set file|--dataset_config"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_config_file(door: Door, case: str) -> None:
    content, says = CONFIG_FILES[case]
    door.refuses(TRAIN, "--config_file", door.file("run.toml", content), says=says)


def test_no_config_file(door: Door) -> None:
    door.refuses(TRAIN, "--config_file", "gone.toml", says="gone.toml: no such file")


def test_unknown_key_of_a_config_file(door: Door) -> None:
    file = door.file("run.toml", "lerning_rate = 1\n")
    door.refuses(TRAIN, "--strict", "--config_file", file, says="lerning_rate|did you mean learning_rate?")


def test_every_key_of_a_front_end_is_one_warning(door: Door) -> None:
    """Keys of other model families' scripts in the file of a front end do not stop it: the data is what is missing."""
    spec = json.loads((ROOT / "tests" / "spec" / "gui_keys.json").read_text(encoding="utf-8"))
    keys = [entry["key"] for entry in spec["scripts"]["train_network.py"] if entry["known"] in ("other", "front_end")]
    file = door.file("run.toml", "".join(f"{key} = 1\n" for key in keys))
    data = door.folder / "gone"
    code, text = door.run(TRAIN, "--config_file", file, data=data)
    *warnings, error = text.splitlines()
    assert code == 1
    assert error.startswith(f"error: --train_data_dir {data}")
    assert len(warnings) == 1
    assert [key for key in keys if key not in warnings[0]] == []
    assert len(keys) > 20


# Options

CONTRADICTIONS = {
    "nothing to train": (
        "--network_train_unet_only --network_train_text_encoder_only",
        "--network_train_unet_only with --network_train_text_encoder_only",
    ),
    "cache and colours": ("--cache_latents --color_aug", "with color_aug|turn off color_aug"),
    "cache and random crops": ("--cache_latents --random_crop", "with random_crop|turn off random_crop"),
    "full without mixed": ("--full_fp16", "--full_fp16 without --mixed_precision fp16"),
    "full of the other kind": ("--full_bf16 --mixed_precision fp16", "--full_bf16 without --mixed_precision bf16"),
    "window without interval": ("--save_last_n_steps 2", "--save_last_n_steps without --save_every_n_steps"),
    "scale without offset": ("--adaptive_noise_scale 0.1", "--adaptive_noise_scale without --noise_offset"),
    "velocity twice": ("--v_pred_like_loss 0.1 --v_parameterization", "--v_pred_like_loss with --v_parameterization"),
    "velocity weight": ("--scale_v_pred_loss_like_noise_pred", "without --v_parameterization"),
    "empty time range": ("--min_timestep 500 --max_timestep 300", "--min_timestep 500 and --max_timestep 300"),
    "two optimizers": ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam together with another optimizer"),
    "bucket limits": ("--enable_bucket --min_bucket_reso 512 --max_bucket_reso 256", "--min_bucket_reso 512"),
    "warm-up of a constant": ("--lr_scheduler constant --lr_warmup_steps 10", "constant has no warm-up"),
    "samples without prompts": ("--sample_every_n_steps 1", "without --sample_prompts"),
    "logs without folder": ("--log_with tensorboard", "--log_with tensorboard without --logging_dir"),
    "rank without file": ("--dim_from_weights", "--dim_from_weights without --network_weights"),
    "rates of 0": ("--unet_lr 0 --text_encoder_lr 0", "no part of the network has a learning rate"),
    "resume of nothing": ("--resume_from_huggingface", "--resume_from_huggingface without --resume"),
    "unknown optimizer": ("--optimizer_type Adamm", "unknown optimizer 'Adamm'|did you mean Adam"),
    "missing package": ("--optimizer_type no.such.Class", "no.such.Class|pip install"),
    "unknown argument": ("--optimizer_args foo=1", "--optimizer_args foo: AdamW has no such argument"),
    "unknown schedule": ("--lr_scheduler cosinee", "'cosinee' is unknown|did you mean cosine?"),
    "unknown network module": ("--network_module networks.lorra", "networks.lorra|did you mean networks.lora?"),
    "no network module": ("--network_module os", "--network_module os has no function create_network"),
    "argument without value": ("--network_args conv_dim", "'conv_dim' has no value"),
    "argument that is no number": ("--network_args conv_dim=x", "conv_dim=x is not a number"),
    "too many skipped layers": ("--clip_skip 30", "clip_skip 30 is too large"),
    "missing state": ("--resume gone-state", "--resume gone-state: there is no such folder"),
    "missing base weights": ("--base_weights gone.safetensors", "--base_weights gone.safetensors"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options(door: Door, case: str) -> None:
    options, says = CONTRADICTIONS[case]
    door.refuses(TRAIN, *options.split(), says=says)


DRAWING = {
    "no steps": ("--steps 0", "--steps 0 is below 1"),
    "strength": ("--strength 2", "--strength 2.0 is outside 0..1"),
    "prompt file": ("--from_file gone.txt", "prompt file gone.txt cannot be read|check --from_file"),
    "modules and weights": ("--network_module networks.lora", "1 network modules but 0 weights files"),
    "weights": ("--network_module networks.lora --network_weights gone.pt", "gone.pt not found"),
    "module": ("--network_module networks.lorra --network_weights gone.pt", "networks.lorra|check --network_module"),
    "later feature": ("--image_path x.png", "--image_path: image to image is not supported yet"),
}


@pytest.mark.parametrize("case", DRAWING)
def test_drawing_options(door: Door, case: str) -> None:
    options, says = DRAWING[case]
    door.refuses(DRAW, *options.split(), says=says)


def test_a_prompt_that_cannot_be_drawn_is_said(door: Door) -> None:
    code, text = door.run(DRAW, "--W", 65)
    assert code == 1
    assert "width 65 is not a multiple of 8: use 64" in text
    assert contents(door.output) == contents_of_earlier()


def contents_of_earlier() -> dict[str, bytes | None]:
    folders = {str(p): None for name in EARLIER for p in Path(name).parents if str(p) != "."}
    return dict(sorted({**EARLIER, **folders}.items()))


# Networks

WRONG_NETWORKS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SDXL": (
        {
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (2, 32),
            "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": (32, 2),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 8),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (8, 2),
        },
        "is a network for SDXL",
    ),
    "SD 2.x": (
        {
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (2, 500),
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (500, 2),
        },
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight is (2, 500)",
    ),
    "a model": ({"model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "is a whole model"),
}
USES = {
    "to go on from": (TRAIN, ("--network_weights",)),
    "with its rank": (TRAIN, ("--dim_from_weights", "--network_weights")),
    "as a base": (TRAIN, ("--base_weights",)),
    "to draw with": (DRAW, ("--network_module", "networks.lora", "--network_weights")),
    "merged": (DRAW, ("--network_merge", "--network_module", "networks.lora", "--network_weights")),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", WRONG_NETWORKS)
def test_network_of_the_wrong_family(door: Door, case: str, use: str) -> None:
    shapes, says = WRONG_NETWORKS[case]
    script, options = USES[use]
    door.refuses(script, *options, foreign(door, "n.safetensors", shapes), says="n.safetensors|" + says)


@pytest.mark.parametrize("use", USES)
def test_cut_network(door: Door, use: str) -> None:
    script, options = USES[use]
    file = door.file("n.safetensors", door.model.read_bytes()[:9000])
    door.refuses(script, *options, file, says="n.safetensors is truncated")


# State folders


def test_damaged_state(door: Door) -> None:
    data = door.pictures()
    code, text = door.run(TRAIN, "--save_state", "--output_dir", "states", data=data)
    assert code == 0, text
    state = door.folder / "states" / "x-state"
    for name in ("run.json", "weights.safetensors", "optimizer.pt"):
        whole = (state / name).read_bytes()
        (state / name).write_bytes(whole[: len(whole) // 2])
        door.refuses(TRAIN, "--resume", state, "--max_train_steps", 4, data=data, says=f"--resume {state} is damaged")
        (state / name).write_bytes(whole)
    (state / "optimizer.pt").unlink()
    (state / "run.json").unlink()
    door.refuses(TRAIN, "--resume", state, data=data, says=f"--resume {state} is not a state folder")


# Output that cannot be written


def test_output_folder_that_is_a_file(door: Door) -> None:
    file = door.file("taken", "x")
    door.refuses(TRAIN, "--output_dir", file, says="--output_dir {}/taken is a file")
    door.refuses(TRAIN, "--output_dir", file / "below", data=door.folder / "data", says="{}/taken/below")
    door.refuses(TRAIN, "--logging_dir", file, data=door.folder / "data", says="--logging_dir {}/taken is a file")
    door.refuses(DRAW, "--outdir", file, says="{}/taken|check --outdir")
    assert file.read_text() == "x"


@pytest.mark.parametrize("options", [(), ("--save_state",), ("--save_model_as", "ckpt")], ids=["", "state", "ckpt"])
def test_no_room_on_the_disk(door: Door, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    usage = shutil.disk_usage(door.folder)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    said = door.refuses(TRAIN, *options, says="not enough room in {}/out|1.0 kB free|free some space")
    assert "needed" in said


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """A file on a disk that is full after the first bytes."""

    def __init__(self, path: str | Path, mode: str) -> None:
        self.file = open(path, mode)  # noqa: SIM115
        self.count = 0

    def write(self, data: bytes) -> int:
        self.count += 1
        return self.file.write(data) if self.count < 4 else full()

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_disk_that_fills_while_a_network_is_written(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "open", FullFile, raising=False)
    door.refuses(TRAIN, says="the disk is full, {}/out/x.safetensors was not written|free some space")


def test_disk_that_fills_at_the_second_file(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the first step stays, whole."""
    opened: list[str] = []

    def open_until_full(path: str | Path, mode: str = "r") -> Any:
        opened.append(str(path))
        return open(path, mode) if len(opened) == 1 else FullFile(path, mode)

    monkeypatch.setattr(checkpoint_writer, "open", open_until_full, raising=False)
    code, text = door.run(TRAIN, "--save_every_n_steps", 1)
    assert code == 1
    assert f"error: the disk is full, {door.output}/x-step00000002.safetensors was not written" in text
    first = door.output / "x-step00000001.safetensors"
    left = contents(door.output)
    left.pop(first.name)
    assert left == contents_of_earlier()
    from safetensors.torch import load_file

    assert len(load_file(first)) > 100


@pytest.mark.parametrize(
    ("options", "name"),
    [(("--save_model_as", "ckpt"), "x.ckpt"), (("--save_state",), "x-state")],
    ids=["ckpt", "state"],
)
def test_disk_that_fills_in_torch_save(
    door: Door, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr(torch, "save", full)
    door.refuses(TRAIN, *options, says=f"the disk is full, {{}}/out/{name} was not written")


def test_disk_that_fills_while_a_picture_is_written(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(image: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half a picture")
        full()

    monkeypatch.setattr(Image.Image, "save", save)
    code, text = door.run(DRAW)
    assert code == 1
    assert "the disk is full" in text
    assert [line for line in text.splitlines() if line.startswith("error:")] == [text.splitlines()[-1]]
    assert contents(door.output) == contents_of_earlier()


# In their own process


def in_its_own_process(*command: Any, prepare: str = "") -> subprocess.CompletedProcess[str]:
    script, *options = (str(one) for one in command)
    code = f"{prepare}\nimport runpy, sys\nsys.argv = {[script, *options]!r}\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_process_without_options() -> None:
    for script, word in (("train_network.py", "--pretrained_model_name_or_path"), ("gen_img_diffusers.py", "--ckpt")):
        done = in_its_own_process(ROOT / script)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {word}")
        assert done.stderr.count("\n") == 1


def test_process_with_a_missing_model(door: Door) -> None:
    done = in_its_own_process(ROOT / "gen_img_diffusers.py", *door.command(DRAW, (), "gone.ckpt", None))
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: model gone.ckpt does not exist: check the path"]
    assert contents(door.output) == contents_of_earlier()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_process_that_may_write_no_large_file(door: Door) -> None:
    """The kernel refuses the write in the middle of the file, as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = in_its_own_process(
        ROOT / "train_network.py", *door.command(TRAIN, ("--network_dim", 8), door.model, None), prepare=limit
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [done.stderr.splitlines()[-1]]
    assert f"the disk is full, {door.output}/x.safetensors was not written" in lines[0]
    assert "Traceback" not in done.stderr
    assert contents(door.output) == contents_of_earlier()
