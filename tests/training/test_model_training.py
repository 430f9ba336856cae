"""Trainings of whole models on the tiny ones: what is written, what learns, what resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.data.group import build_group
from library.data.records import DatasetSettings, ScanResult
from library.messages import UserError
from library.training.recipes.model import FineTuneRecipe

DATA = Path(__file__).parents[1] / "reference" / "data"
SCRIPTS = ("train_db", "fine_tune", "sdxl_train")
TEXT = {"train_db": (), "fine_tune": ("--train_text_encoder",), "sdxl_train": ("--train_text_encoder",)}
UNET, TEXT1, TEXT2 = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."
CLIP = "cond_stage_model."


def weights(folder: Path, name: str = "x.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def moved(written: dict[str, torch.Tensor], source: Path) -> set[str]:
    """Keys whose tensors are not those of the source."""
    before = load_file(source)
    assert written.keys() == before.keys()
    return {key for key in before if not torch.equal(written[key].float(), before[key].float())}


def under(keys: set[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


@pytest.mark.parametrize(("steps", "warnings"), [(64, 0), (32, 1)])
def test_uneven_bucket_steps_of_fine_tuning_are_told(steps: int, warnings: int, caplog: Any) -> None:
    settings = DatasetSettings(
        resolution=(128, 128), enable_bucket=True, min_bucket_reso=64, bucket_reso_steps=steps, kind="finetuning"
    )
    FineTuneRecipe().check_group(None, build_group([settings], [ScanResult()], tokenize=None, seed=0))
    assert caplog.text.count(f"bucket_reso_steps {steps} is no multiple of 64") == warnings


# Files


def test_the_form_of_the_source_is_kept(train_model: Any, tiny_sd15: Path) -> None:
    out = train_model("train_db", steps=1)
    content = torch.load(out / "x.ckpt", weights_only=True)
    assert content["state_dict"].keys() == load_file(tiny_sd15).keys()
    assert (content["epoch"], content["global_step"]) == (1, 1)
    assert (train_model("train_db", "--use_safetensors", output="b", steps=1) / "x.safetensors").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_folders_are_read_by_diffusers(train_model: Any, script: str) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    out = train_model(script, "--save_model_as", "diffusers_safetensors", "--save_precision", "fp16", steps=1)
    kind = StableDiffusionXLPipeline if script == "sdxl_train" else StableDiffusionPipeline
    pipe = kind.from_pretrained(out / "x", torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=1, width=64, height=64, output_type="latent").images
    assert torch.isfinite(picture).all()
    stored = load_file(out / "x" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("script", ["train_db", "sdxl_train"])
def test_single_files_are_read_by_diffusers(train_model: Any, script: str) -> None:
    """With the configuration of a folder, as a file does not say the sizes of a tiny model."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    out = train_model(script, "--use_safetensors", steps=1)
    folder = train_model(script, "--save_model_as", "diffusers_safetensors", output="folder", steps=1) / "x"
    kind = StableDiffusionXLPipeline if script == "sdxl_train" else StableDiffusionPipeline
    from_folder = kind.from_pretrained(folder, local_files_only=True)
    from_file = kind.from_single_file(out / "x.safetensors", config=str(folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):  # the second encoder of SDXL is made at its full size there
        one, two = getattr(from_folder, part).state_dict(), getattr(from_file, part).state_dict()
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key].float(), two[key].float())] == [], part


def test_modelspec(train_model: Any) -> None:
    out = train_model("sdxl_train", "--save_model_as", "safetensors", "--metadata_author", "me", steps=1)
    with safe_open(out / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.author"] == "me" and metadata["modelspec.resolution"] == "96x96"
    assert not [key for key in metadata if not key.startswith("modelspec.")]


def test_old_folders_go(train_model: Any) -> None:
    options = ("--save_model_as", "diffusers", "--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state")
    out = train_model("train_db", *options, steps=4)
    names = {path.name for path in out.iterdir()}
    assert "x-step00000001" not in names and "x-step00000001-state" not in names
    assert {"x", "x-state", "x-step00000003", "x-step00000004", "x-step00000004-state"} <= names
    assert (out / "x" / "unet" / "diffusion_pytorch_model.bin").is_file()


# What learns


def test_the_text_encoder_learns_by_default_in_train_db(train_model: Any, tiny_sd15: Path) -> None:
    keys = moved(weights(train_model("train_db", "--use_safetensors")), tiny_sd15)
    assert under(keys, UNET) and under(keys, CLIP) and not under(keys, "first_stage_model.")


@pytest.mark.parametrize("stop", ["-1", "0"])
def test_a_text_encoder_that_never_learns(train_model: Any, tiny_sd15: Path, stop: str) -> None:
    keys = moved(weights(train_model("train_db", "--use_safetensors", "--stop_text_encoder_training", stop)), tiny_sd15)
    assert under(keys, UNET) and not under(keys, CLIP)


def test_a_text_encoder_that_stops_learning(train_model: Any) -> None:
    options = ("--use_safetensors", "--save_every_n_steps", "1", "--stop_text_encoder_training", "1")
    out = train_model("train_db", *options, steps=3)
    first, last = weights(out, "x-step00000001.safetensors"), weights(out)
    changed = {key for key in first if not torch.equal(first[key], last[key])}
    assert under(changed, UNET) and not under(changed, CLIP)


@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ((), {UNET}),
        (("--train_text_encoder",), {UNET, TEXT1, TEXT2}),
        (("--train_text_encoder", "--learning_rate_te1", "0"), {UNET, TEXT2}),
        (("--train_text_encoder", "--learning_rate_te2", "0", "--learning_rate_te1", "1e-4"), {UNET, TEXT1}),
        (("--train_text_encoder", "--learning_rate", "0", "--learning_rate_te1", "1e-4"), {TEXT1}),
    ],
)
def test_rates_of_sdxl(train_model: Any, tiny_sdxl: Path, options: tuple[str, ...], learning: set[str]) -> None:
    keys = moved(weights(train_model("sdxl_train", "--use_safetensors", *options, steps=1)), tiny_sdxl)
    assert {prefix for prefix in (UNET, TEXT1, TEXT2) if under(keys, prefix)} == learning


def test_block_rates_train_the_text_encoders_too(train_model: Any, tiny_sdxl: Path) -> None:
    rates = ",".join("0" if index < 22 else "1e-3" for index in range(23))
    options = ("--use_safetensors", "--block_lr", rates, "--train_text_encoder")
    keys = moved(weights(train_model("sdxl_train", *options, steps=1)), tiny_sdxl)
    assert {key for key in keys if key.startswith(UNET)} <= {
        f"{UNET}out.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")
    }
    assert under(keys, TEXT1) and under(keys, TEXT2)


def test_nothing_to_learn(train_model: Any) -> None:
    with pytest.raises(UserError, match="every learning rate is 0"):
        train_model("fine_tune", "--learning_rate", "0")


def test_cached_text_cannot_learn(train_model: Any) -> None:
    with pytest.raises(UserError, match="--cache_text_encoder_outputs with --train_text_encoder"):
        train_model("sdxl_train", "--cache_text_encoder_outputs", "--train_text_encoder")


# The same numbers by other ways


def losses(out: Path) -> list[float]:
    """Losses of every update, from the run's record."""
    lines = (out / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_bf16(train_model: Any, script: str) -> None:
    options = (*TEXT[script], "--mixed_precision", "bf16", "--full_bf16", "--use_safetensors")
    written = weights(train_model(script, *options, steps=1))
    parts = (UNET, TEXT1) if script == "sdxl_train" else (UNET, CLIP)
    for part in parts:
        kinds = {t.dtype for key, t in written.items() if key.startswith(part) and t.is_floating_point()}
        assert kinds == {torch.bfloat16}, part


@pytest.mark.parametrize(
    ("script", "options"), [("train_db", ("--stop_text_encoder_training", "-1")), ("fine_tune", ()), ("sdxl_train", ())]
)
def test_what_does_not_learn_is_written_as_it_was_read(
    train_model: Any, tiny_sd15: Path, tiny_sdxl: Path, script: str, options: tuple[str, ...]
) -> None:
    """Though it computes in half precision."""
    source = tiny_sdxl if script == "sdxl_train" else tiny_sd15
    out = train_model(script, *options, "--mixed_precision", "bf16", "--use_safetensors", steps=1)
    keys = moved(weights(out), source)
    assert keys and all(key.startswith(UNET) for key in keys)


def test_kept_weights() -> None:
    from library.training.kept_weights import KeptWeights

    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1 / 3, 0.5]]))
        module.bias.copy_(torch.tensor([0.25]))
    exact = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = KeptWeights()
    kept.keep(module, torch.bfloat16)
    ((_, tensors),) = kept.modules
    assert set(tensors) == {"weight"} and tensors["weight"].dtype == torch.float32
    module.to(torch.bfloat16)
    halved = module.weight.detach().clone()
    with kept.restored():
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in exact.items())
    assert module.weight.dtype == torch.bfloat16 and torch.equal(module.weight, halved)


def test_cached_text_gives_the_same_losses(train_model: Any) -> None:
    plain = losses(train_model("sdxl_train", output="a"))
    cached = losses(train_model("sdxl_train", "--cache_text_encoder_outputs", output="b"))
    assert cached == pytest.approx(plain, rel=1e-5)


def test_short_captions(train_model: Any) -> None:
    plain = losses(train_model("train_db", output="plain", steps=1))
    short = losses(train_model("train_db", "--no_token_padding", output="short", steps=1))
    assert all(map(math.isfinite, short)) and short != plain
    with pytest.raises(UserError, match="--no_token_padding with --max_token_length 150"):
        train_model("train_db", "--no_token_padding", "--max_token_length", "150")


def test_regularisation_weights_count_in_sdxl_train(train_model: Any) -> None:
    options = ("--reg_data_dir", str(DATA / "reg"), "--train_batch_size", "1", "--prior_loss_weight", "0")
    found = losses(train_model("sdxl_train", *options, steps=6))
    assert 0 in found and max(found) > 0


def test_velocity_is_learned_on_sdxl(train_model: Any) -> None:
    """The recorded run of `train_db.py` does it for SD."""
    noise = losses(train_model("sdxl_train", output="noise", steps=1))
    velocity = losses(train_model("sdxl_train", "--v_parameterization", output="velocity", steps=1))
    assert velocity != pytest.approx(noise, rel=1e-3)


# Names that others assign


@pytest.mark.parametrize(
    ("script", "module", "names"),
    [
        ("train_db", "train_util", ("load_tokenizer", "_load_target_model")),
        ("sdxl_train", "sdxl_train_util", ("load_tokenizers", "load_target_model")),
    ],
)
def test_functions_that_open_the_model_are_those_assigned(
    train_model: Any, monkeypatch: pytest.MonkeyPatch, script: str, module: str, names: tuple[str, ...]
) -> None:
    import importlib

    porch = importlib.import_module(f"library.{module}")
    called = []
    for name in names:
        own = getattr(porch, name)
        monkeypatch.setattr(porch, name, lambda *given, name=name, own=own: (called.append(name), own(*given))[1])
    replaced = train_model(script, "--use_safetensors", output="replaced", steps=1)
    assert set(called) == set(names)
    monkeypatch.undo()
    plain = weights(train_model(script, "--use_safetensors", output="plain", steps=1))
    opened = weights(replaced)
    assert [key for key in plain if not torch.equal(plain[key], opened[key])] == []


# Resume and samples


def test_resumed_after_the_text_encoder_stopped(train_model: Any) -> None:
    options = ("--use_safetensors", "--stop_text_encoder_training", "1", "--save_state", "--save_every_n_steps", "2")
    out = train_model("train_db", *options, output="a", steps=3)
    rest = train_model("train_db", *options, "--resume", str(out / "x-step00000002-state"), output="b", steps=3)
    whole, resumed = weights(out), weights(rest)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_state_folder_of_sd_scripts(train_model: Any, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Models in the order in which they were prepared, the optimizer's state over one group."""
    from library.models.family import family

    model = family("sdxl").load(tiny_sdxl)
    folder = tmp_path / "old-state"
    folder.mkdir()
    modules = (model.unet, *model.text_encoders)
    for number, module in enumerate(modules):
        state = {key: tensor + 0.01 for key, tensor in module.state_dict().items() if tensor.is_floating_point()}
        state |= {key: tensor for key, tensor in module.state_dict().items() if not tensor.is_floating_point()}
        state |= {"text_model.embeddings.position_ids": torch.arange(77)[None]} if number else {}
        torch.save(state, folder / f"pytorch_model{f'_{number}' if number else ''}.bin")
    idle = {id(p) for p in family("sdxl").idle_parameters(model.text_encoders)}
    learning = [p for module in modules for p in module.parameters() if id(p) not in idle]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save({"last_epoch": 1, "_step_count": 2, "_last_lr": [1e-3]}, folder / "scheduler.bin")
    options = ("--train_text_encoder", "--use_safetensors", "--resume", str(folder))
    written, source = weights(train_model("sdxl_train", *options, steps=2)), load_file(tiny_sdxl)
    for prefix in (UNET, TEXT1, TEXT2):
        keys = [key for key in source if key.startswith(prefix) and key.endswith("weight")]
        assert all(((written[key] - source[key]).float().mean() - 0.01).abs() < 5e-3 for key in keys)


@pytest.mark.parametrize("script", ["train_db", "sdxl_train"])
def test_sample_pictures_show_the_model(train_model: Any, tmp_path: Path, script: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1", encoding="utf-8")
    options = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    out = train_model(script, *options, steps=1)
    pictures = sorted((out / "sample").glob("*.png"))
    assert len(pictures) == len({picture.read_bytes() for picture in pictures}) == 2


def test_masks(train_model: Any, tmp_path: Path) -> None:
    """Transparent places do not count: a picture that is transparent all over teaches nothing."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "masked" / "1_shape"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        pixels = np.full((96, 96, 4), 120, dtype=np.uint8)
        pixels[..., 3] = 0
        Image.fromarray(pixels, "RGBA").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a shape", encoding="utf-8")
    meta = {name: {"caption": "a shape", "train_resolution": [96, 96]} for name in ("a", "b")}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for script in SCRIPTS:
        source = folder if script == "fine_tune" else folder.parent
        options = ["--train_data_dir", str(source), "--alpha_mask", "--masked_loss", "--caption_extension", ".txt"]
        options += ["--in_json", str(tmp_path / "meta.json")] if script == "fine_tune" else []
        assert losses(train_model(script, *options, output=script, steps=1, data=False)) == [0.0]
