"""Old functions that save whole models, called as other programs call them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train
from library import model_util, sdxl_train_util, train_util
from library.models.family import family
from library.options.parser import build_parser

PROMPT = {"prompt": "a red circle", "sample_steps": 2, "width": 64, "height": 64, "scale": 3.0, "seed": 7, "enum": 3}


def namespace(script: str, folder: Path, *options: str) -> Any:
    return build_parser(script).parse_args(["--output_dir", str(folder), "--output_name", "m", *options])


def accelerator() -> Any:
    return SimpleNamespace(print=lambda text: None, save_state=lambda folder: Path(folder).mkdir(parents=True))


def test_sd_at_the_end(tiny_sd15: Path, tmp_path: Path) -> None:
    encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, str(tiny_sd15))
    args = namespace("train_db.py", tmp_path, "--metadata_author", "me")
    parts = (encoder, unet, vae)
    train_util.save_sd_model_on_train_end(args, str(tiny_sd15), True, True, torch.float16, 2, 20, *parts)
    written, source = load_file(tmp_path / "m.safetensors"), load_file(tiny_sd15)
    assert written.keys() == source.keys()
    assert {t.dtype for t in written.values() if t.is_floating_point()} == {torch.float16}
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["modelspec.author"] == "me"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
    train_util.save_sd_model_on_train_end(args, None, False, True, None, 2, 20, *parts)
    assert (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_sd_after_epochs_and_steps(tiny_sd15: Path, tmp_path: Path) -> None:
    encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, str(tiny_sd15))
    args = namespace("train_db.py", tmp_path, "--save_every_n_epochs", "1", "--save_last_n_epochs", "1")
    save = train_util.save_sd_model_on_epoch_end_or_stepwise
    for epoch in (0, 1):
        save(args, True, accelerator(), None, True, False, None, epoch, 4, 5 * epoch + 5, encoder, unet, vae)
    assert [path.name for path in tmp_path.iterdir()] == ["m-000002.ckpt"]
    content = torch.load(tmp_path / "m-000002.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 10)
    save(args, False, accelerator(), None, True, False, None, 2, 4, 12, encoder, unet, vae)
    assert (tmp_path / "m-step00000012.ckpt").is_file()


def test_sdxl(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = family("sdxl").load(tiny_sdxl)
    parts = (*model.text_encoders, model.unet, model.vae, model.extras["logit_scale"], model.extras["ckpt_info"])
    args = namespace("sdxl_train.py", tmp_path, "--save_every_n_steps", "2")
    sdxl_train_util.save_sd_model_on_train_end(args, str(tiny_sdxl), True, True, None, 1, 4, *parts)
    assert load_file(tmp_path / "m.safetensors").keys() == load_file(tiny_sdxl).keys()
    sdxl_train_util.save_sd_model_on_epoch_end_or_stepwise(
        args, False, accelerator(), None, False, True, torch.float16, 0, 1, 2, *parts
    )
    assert (tmp_path / "m-step00000002" / "text_encoder_2" / "model.safetensors").is_file()


def test_saving_options_go_on_a_parser() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    train_util.add_sd_saving_arguments(parser)
    assert parser.parse_args(["--save_model_as", "diffusers"]).use_safetensors is False
    assert parser.parse_args([]).save_model_as is None


def test_one_sample_picture(tiny_sd15: Path, tmp_path: Path) -> None:
    import contextlib

    model = family("sd").load(tiny_sd15)
    pipeline = train_util.StableDiffusionLongPromptWeightingPipeline(
        vae=model.vae,
        text_encoder=model.text_encoders[0],
        tokenizer=model.tokenizers[0],
        unet=model.unet,
        scheduler=train_util.get_my_scheduler(sample_sampler="ddim", v_parameterization=False),
    )
    args = SimpleNamespace(output_name="m")
    helper = SimpleNamespace(autocast=contextlib.nullcontext)
    train_util.sample_image_inference(helper, args, pipeline, str(tmp_path), PROMPT, None, 5, None)
    (picture,) = tmp_path.iterdir()
    assert picture.name.startswith("m_") and picture.name.endswith("_000005_03_7.png")


def test_block_rates_as_groups_and_logs(tiny_sdxl: Path) -> None:
    unet = family("sdxl").load(tiny_sdxl).unet
    rates = [0.0 if i in (3, 7) else 0.1 * (i + 1) for i in range(sdxl_train.UNET_NUM_BLOCKS_FOR_BLOCK_LR)]
    groups = sdxl_train.get_block_params_to_optimize(unet, rates)
    present = {index for index in range(23) if index not in (3, 7)}
    assert [group["lr"] for group in groups] == pytest.approx([rates[index] for index in sorted(present)])
    logs: dict[str, float] = {}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    sdxl_train.append_block_lr_to_logs(rates, logs, schedule, "SGD")
    assert logs == pytest.approx({f"lr/block{index}": rates[index] for index in present})
