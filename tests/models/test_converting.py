"""Conversion of models: the recorded command lines as they were meant, and real files in all directions."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.messages import UserError
from library.models import converting
from library.models.family import family
from library.options.parser import build_parser, resolve

SCRIPT = "tools/convert_diffusers20_original_sd.py"
RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "tools_convert.json").read_text(encoding="utf-8"))[
    "cases"
]
# The original asked which version a file is; now its tensors say so.
SEEN_FROM_TENSORS = ["in.safetensors", "out"]
# A name with a dot became a file; a file that is not there was looked for on the hub.
DOTTED, MISSING = "dir.v1", "missing.safetensors"


def options_of(argv: list[str]):
    return resolve(build_parser(SCRIPT).parse_args(argv), SCRIPT).model_convert


def convert(command: str, *paths: Path) -> None:
    converting.convert_model(options_of([*shlex.split(command), *map(str, paths)]))


def test_number_of_recorded_cases() -> None:
    assert len(RECORDED) == 53
    assert sum(bool(case["error"]) for case in RECORDED) == 6


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: " ".join(case["argv"]) + f" {case['cross_attention_dim']}")
def test_recorded_command_lines(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = case["argv"]
    if case["error"] == "SystemExit":
        with pytest.raises(SystemExit):
            options_of(argv)
        return
    options = options_of(argv)
    if options.model_to_load == MISSING:
        with pytest.raises(UserError, match=f"{MISSING} does not exist"):
            converting.find_source(MISSING)
        return
    is_file = options.model_to_load.startswith("in.")
    # A file without a version is now told by its tensors; folders always were, by the width of the text.
    version = (
        "sd2"
        if (options.v2 and not options.v1) or (options.v1 == options.v2 and case["cross_attention_dim"] == 1024)
        else "sd1"
    )
    source = converting.Source(Path(options.model_to_load), is_file, version, converting.Told(), None, {})
    if case["error"]:
        if argv == SEEN_FROM_TENSORS:
            converting.refuse_other_kind(source, options)
        else:
            with pytest.raises(UserError, match="--v1 and --v2"):
                converting.refuse_other_kind(source, options)
        return
    converting.refuse_other_kind(source, options)
    opened, saved = case["calls"]
    assert is_file == (opened["call"] == "open checkpoint")
    assert opened["path"] == options.model_to_load
    assert saved["v2"] == (version == "sd2")
    assert saved["path"] == options.model_to_save
    if options.model_to_save == DOTTED:
        assert not converting.is_file_name(DOTTED)
        return
    assert converting.is_file_name(options.model_to_save) == (saved["call"] == "save checkpoint")
    if saved["call"] == "save checkpoint":
        assert (options.epoch, options.global_step) == (saved["epoch"], saved["global_step"])
        assert str(converting.save_dtype(options)) == saved["dtype"]
    else:
        assert (options.reference_model, options.use_safetensors) == (
            saved["reference_model"],
            saved["use_safetensors"],
        )


def same(a: Path, b: Path, *, but: set[str] = frozenset()) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() - but == right.keys() - but
    assert not [key for key in left.keys() - but if not left[key].equal(right[key])]


def made_up(path: Path) -> set[str]:
    """Tensors of a file that no folder has and no program uses: a block behind the last, a projection, a scale."""
    blocks = [int(m.group(1)) for key in load_file(path) if (m := re.match(r"cond_stage_model.*resblocks\.(\d+)", key))]
    last = f".resblocks.{max(blocks, default=-1)}."
    unused = ("cond_stage_model.model.text_projection", ".logit_scale")
    return {key for key in load_file(path) if key.endswith(unused) or (key.startswith("cond_stage") and last in key)}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_there_and_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """File -> folder -> file: every tensor of the parts is the same, bit for bit."""
    source = request.getfixturevalue({"sd1": "tiny_sd15", "sd2": "tiny_sd21", "sdxl": "tiny_sdxl"}[kind])
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    convert("--use_safetensors", source, tmp_path / "folder.v1")
    assert (tmp_path / "folder.v1" / "model_index.json").is_file()
    convert("", source, first)
    convert("", tmp_path / "folder.v1", second)
    same(first, second, but=made_up(first))
    for path in (first, second):
        with safe_open(path, "pt") as file:
            texts = file.metadata()
        assert texts["modelspec.prediction_type"] == ("v" if kind == "sd2" else "epsilon")
    scheduler = json.loads((tmp_path / "folder.v1" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")


@pytest.mark.parametrize("flag", ["--fp16", "--bf16", "--float", "--save_precision_as fp16"])
@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "folder"])
def test_number_formats(flag: str, target: str, tiny_sd15: Path, tmp_path: Path) -> None:
    convert(flag, tiny_sd15, tmp_path / target)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[flag.split()[-1].lstrip("-")]
    path = tmp_path / target / "unet" if target == "folder" else tmp_path / target
    path = path / "diffusion_pytorch_model.bin" if target == "folder" else path
    assert converting.common_dtype(converting.open_checkpoint(path)) == wanted


def test_the_source_keeps_its_number_format(tiny_sdxl: Path, tmp_path: Path) -> None:
    convert("--bf16", tiny_sdxl, tmp_path / "a.safetensors")
    convert("--use_safetensors", tmp_path / "a.safetensors", tmp_path / "folder")
    convert("", tmp_path / "folder", tmp_path / "b.safetensors")
    same(tmp_path / "a.safetensors", tmp_path / "b.safetensors", but={"conditioner.embedders.1.model.logit_scale"})


def test_epochs_are_counted_on(tiny_sd15: Path, tmp_path: Path) -> None:
    convert("--v1 --epoch 3 --global_step 700", tiny_sd15, tmp_path / "a.ckpt")
    convert("--v1 --epoch 1 --global_step 30", tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    written = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (4, 730)


def test_reference_model(tiny_sd15: Path, tmp_path: Path) -> None:
    convert("", tiny_sd15, tmp_path / "reference")
    scheduler = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    (tmp_path / "reference" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "reference" / "tokenizer" / "added.txt").write_text("word")
    convert(f"--reference_model {tmp_path / 'reference'}", tiny_sd15, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()) == scheduler
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert (tmp_path / "out" / "tokenizer" / "added.txt").is_file()
    with pytest.raises(UserError, match="neither tokenizer nor scheduler"):
        convert(f"--reference_model {tmp_path}", tiny_sd15, tmp_path / "out2")


def test_variant(tiny_sd15: Path, tmp_path: Path) -> None:
    convert("--use_safetensors --float", tiny_sd15, tmp_path / "folder")
    convert("--use_safetensors --fp16", tiny_sd15, tmp_path / "half")
    for file in list((tmp_path / "half").glob("*/*.safetensors")):
        name = file.name.replace(".safetensors", ".fp16.safetensors")
        file.rename(tmp_path / "folder" / file.parent.name / name)
    for variant, dtype in (("", torch.float32), ("--variant fp16", torch.float16)):
        convert(variant, tmp_path / "folder", tmp_path / "out.safetensors")
        assert converting.common_dtype(converting.open_checkpoint(tmp_path / "out.safetensors")) == dtype
    with pytest.raises(UserError, match="no weights of --variant ema"):
        convert("--variant ema", tmp_path / "folder", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a file"):
        convert("--variant fp16", tiny_sd15, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_metadata(tiny_sd15: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    for text in ('{"author": "me", "n": 1}', "{'author': 'me', 'n': 1}"):
        converting.convert_model(options_of(["--metadata", text, str(tiny_sd15), str(target)]))
        with safe_open(target, "pt") as file:
            assert {"author": "me", "n": "1", "modelspec.title": "a"}.items() <= file.metadata().items()
    for text in ("[1]", "__import__('os')", "{"):
        with pytest.raises(UserError, match="no table"):
            converting.parse_metadata(text)
    with pytest.raises(UserError, match="no place"):
        convert("""--metadata '{"a": "b"}'""", tiny_sd15, tmp_path / "a.ckpt")


def test_contradictions(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.x, but --v2"):
        convert("--v2", tiny_sd15, tmp_path / "out")
    with pytest.raises(UserError, match="Stable Diffusion XL, but --v1"):
        convert("--v1", tiny_sdxl, tmp_path / "out")
    with pytest.raises(UserError, match="the source itself"):
        convert("", tiny_sd15, tiny_sd15)
    with pytest.raises(UserError, match="does not exist"):
        convert("", tmp_path / "nothing", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_predictions_are_the_same(tiny_sd21: Path, tmp_path: Path) -> None:
    """The folder's U-Net computes what the file's does."""
    convert("--v2 --unet_use_linear_projection", tiny_sd21, tmp_path / "folder")
    owner = family("sd")
    models = [owner.load(path, v2=True, v_parameterization=True) for path in (tiny_sd21, tmp_path / "folder")]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 77, models[0].unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        a, b = (model.unet(x, torch.tensor([10]), text).sample for model in models)
    assert a.equal(b)
