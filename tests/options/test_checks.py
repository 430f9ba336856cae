"""Combinations of options: what stops, what warns, what has no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from library import messages
from library.messages import UserError
from library.options.describe import describe
from library.options.effects import NEEDS, without_effect
from library.options.parser import Resolved, parse, resolve
from library.options.scripts import find_script

TRAIN = ["--pretrained_model_name_or_path", "m", "--network_module", "n", "--output_dir", "o"]
DATA = ["--train_data_dir", "d"]


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_said", set())


def options(line: str = "", data: bool = True) -> Resolved:
    return resolve(parse("train_network.py", [*TRAIN, *(DATA if data else []), *line.split()]))


def sdxl_options(line: str = "") -> Resolved:
    return resolve(parse("sdxl_train_network.py", [*TRAIN, *DATA, *line.split()]), "sdxl_train_network.py")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--v2", "--v2"),
        ("--weighted_captions", "--weighted_captions"),
        ("--cache_text_encoder_outputs", "--network_train_unet_only"),
        ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"),
        ("--clip_skip 0", "--clip_skip"),
    ],
)
def test_refusals_of_sdxl(line: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        sdxl_options(line)


def test_sdxl_text_cache_on_disk_switches_the_cache_on() -> None:
    resolved = sdxl_options("--cache_text_encoder_outputs_to_disk --network_train_unet_only")
    assert resolved.sdxl.cache_text_encoder_outputs


def test_sdxl_options_without_effect() -> None:
    cached = "--cache_text_encoder_outputs --network_train_unet_only --skip_cache_check"
    resolved = sdxl_options(f"{cached} --caption_dropout_every_n_epochs 2")
    assert {name for name, _ in without_effect(resolved)} == {"caption_dropout_every_n_epochs"}
    resolved = sdxl_options("--clip_skip 2 --disable_mmap_load_safetensors --v_parameterization")
    assert {name for name, _ in without_effect(resolved)} == {"clip_skip", "disable_mmap_load_safetensors"}
    assert "SDXL, velocity" in "\n".join(describe(resolved))


@pytest.mark.parametrize(
    ("line", "rate", "shown"),
    [
        ("", None, "text encoder 0.001"),
        ("--text_encoder_lr 1e-5", 1e-5, "text encoder 1e-05"),
        ("--text_encoder_lr 1e-5 0", [1e-5, 0.0], "text encoder 1 1e-05, text encoder 2 not trained"),
    ],
)
def test_one_rate_or_one_for_each_text_encoder(line: str, rate: object, shown: str) -> None:
    resolved = sdxl_options(f"--learning_rate 1e-3 {line}")
    assert resolved.network.text_encoder_lr == rate
    assert shown in "\n".join(describe(resolved))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--adaptive_noise_scale 0.1", "--noise_offset"),
        ("--scale_v_pred_loss_like_noise_pred", "--v_parameterization"),
        ("--v_pred_like_loss 0.5 --v_parameterization --v2", "--v_pred_like_loss"),
        ("--full_fp16", "--mixed_precision fp16"),
        ("--full_bf16 --mixed_precision fp16", "--mixed_precision bf16"),
        ("--full_fp16 --full_bf16 --mixed_precision fp16", "--full_bf16"),
        ("--log_with tensorboard", "--logging_dir"),
        ("--log_with all", "--logging_dir"),
        ("--network_train_unet_only --network_train_text_encoder_only", "nothing to train"),
        ("--min_timestep 500 --max_timestep 500", "--max_timestep"),
        ("--max_timestep 1001", "1000"),
        ("--min_timestep -1", "--min_timestep"),
        ("--save_every_n_epochs 0", "--save_every_n_epochs"),
        ("--save_every_n_steps 0", "--save_every_n_steps"),
        ("--save_last_n_epochs 0 --save_every_n_epochs 1", "--save_last_n_epochs"),
        ("--save_last_n_steps 10", "--save_every_n_steps"),
        ("--save_last_n_epochs_state 2 --save_state", "--save_every_n_epochs"),
        ("--max_train_steps 0", "--max_train_steps"),
        ("--sample_every_n_steps 10", "--sample_prompts"),
        ("--sample_at_first", "--sample_prompts"),
        ("--dim_from_weights", "--network_weights"),
        ("--use_8bit_adam --use_lion_optimizer", "--optimizer_type"),
        ("--use_8bit_adam --optimizer_type Lion", "--optimizer_type"),
        ("--lr_warmup_steps 10", "constant_with_warmup"),
        ("--lr_scheduler cosin", "did you mean cosine"),
        ("--lr_scheduler adafactor", "--optimizer_type AdaFactor"),
        ("--lr_scheduler piecewise_constant", "step_rules"),
        ("--lr_scheduler cosine_with_min_lr", "--lr_scheduler_min_lr_ratio"),
        ("--lr_scheduler warmup_stable_decay", "--lr_decay_steps"),
        ("--lr_scheduler_type StepLR --lr_warmup_steps 5", "--lr_warmup_steps"),
        ("--optimizer_args weight_decay", "KEY=VALUE"),
        ("--optimizer_args weight_decay=high", "literal"),
        ("--network_args conv_dim", "KEY=VALUE"),
        ("--caption_dropout_rate 1.5", "--caption_dropout_rate"),
        ("--train_batch_size 0", "--train_batch_size"),
        ("--min_bucket_reso 512 --max_bucket_reso 256", "--max_bucket_reso"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        ("--save_state_to_huggingface", "--huggingface_repo_id"),
        ("--resume_from_huggingface", "--resume"),
        ("--clip_skip 0", "--clip_skip"),
        ("--network_dropout 1", "--network_dropout"),
        ("--seed 99999999999", "--seed"),
        ("--dataset_config none.toml", "none.toml"),
    ],
)
def test_errors(line: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        options(line)
    assert named in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize("missing", ["--pretrained_model_name_or_path", "--network_module", "--output_dir"])
def test_required(missing: str) -> None:
    argv = [*TRAIN, *DATA]
    index = argv.index(missing)
    del argv[index : index + 2]
    with pytest.raises(UserError, match=missing):
        resolve(parse("train_network.py", argv))
    resolve(parse("train_network.py", [*argv, "--debug_dataset"]))


def test_no_pictures() -> None:
    with pytest.raises(UserError, match="--train_data_dir"):
        options(data=False)


def test_training_file_given_as_data_set_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text("learning_rate = 1e-4\nresolution = 512\n", encoding="utf-8")
    with pytest.raises(UserError, match="give it as --config_file"):
        options(f"--dataset_config {file}", data=False)
    file.write_text("[general]\nresolution = 512\n[[datasets]]\n", encoding="utf-8")
    options(f"--dataset_config {file}", data=False)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--v_parameterization", "--v_parameterization"),
        ("--v2 --clip_skip 2", "--clip_skip"),
        ("--zero_terminal_snr", "--zero_terminal_snr"),
        ("--cache_latents_to_disk", "--cache_latents"),
        ("--sample_every_n_steps 0", "--sample_every_n_steps"),
        ("--wandb_api_key k --log_with wandb", "--wandb_api_key"),
    ],
)
def test_warnings(line: str, named: str, caplog: pytest.LogCaptureFixture) -> None:
    options(line)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(named in text for text in warnings)


@pytest.mark.parametrize(
    "line",
    [
        "--noise_offset 0 --adaptive_noise_scale 0.1",
        "--optimizer_type AdaFactor --lr_scheduler adafactor --optimizer_args relative_step=False",
        "--optimizer_type AdaFactor --lr_scheduler anything",
        "--optimizer_type AdamWScheduleFree --lr_warmup_steps 10",
        "--save_n_epoch_ratio 4 --save_last_n_epochs 2",
        "--lr_scheduler polynomial --lr_warmup_steps 10% --lr_scheduler_power 2",
        "--max_timestep 1000 --min_timestep 0",
    ],
)
def test_what_is_allowed(line: str, caplog: pytest.LogCaptureFixture) -> None:
    options(line)
    assert not caplog.records


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--huber_c 0.2", {"huber_c"}),
        ("--huber_c 0.2 --loss_type huber", set()),
        ("--lr_scheduler cosine --lr_scheduler_num_cycles 3", {"lr_scheduler_num_cycles"}),
        ("--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3", set()),
        ("--keep_tokens 1", {"keep_tokens"}),
        ("--keep_tokens 1 --shuffle_caption", set()),
        ("--network_train_unet_only --text_encoder_lr 1e-5", {"text_encoder_lr"}),
        ("--optimizer_type AdamWScheduleFree --lr_scheduler cosine", {"lr_scheduler"}),
        ("--max_train_epochs 3 --max_train_steps 100", {"max_train_steps"}),
        ("--xformers --sdpa", {"sdpa"}),
        ("--conditioning_data_dir m", {"conditioning_data_dir"}),
        ("--conditioning_data_dir m --masked_loss", set()),
        ("--in_json m.json --reg_data_dir r --dataset_repeats 2", {"reg_data_dir"}),
        ("--dataset_repeats 2", {"dataset_repeats"}),
        ("--gradient_checkpointing_interval 2", {"gradient_checkpointing_interval"}),
        ("--max_data_loader_n_workers 0 --persistent_data_loader_workers", {"persistent_data_loader_workers"}),
    ],
)
def test_options_without_effect(line: str, names: set[str]) -> None:
    assert {name for name, _ in without_effect(options(line))} == names


def test_rules_name_options_that_exist() -> None:
    scripts = ("train_network.py", "sdxl_train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py")
    scripts += ("train_textual_inversion.py",)
    known = {option.dest for script in scripts for option in find_script(script).options()}
    assert not {name for need in NEEDS for name in need.names} - known
    assert not without_effect(options())


def test_effective_settings() -> None:
    lines = describe(
        options("--unet_lr 1e-4 --text_encoder_lr 0 --optimizer_type adamw --min_snr_gamma 5 --huber_c 0.2 --seed 1")
    )
    text = "\n".join(lines)
    assert "learning rates: U-Net 0.0001, text encoder not trained" in text
    assert "optimizer: AdamW, gradient norm at most 1" in text
    assert "min_snr_gamma 5" in text
    assert "no effect here: --huber_c (needs --loss_type huber or smooth_l1)" in text
