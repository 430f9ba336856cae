"""Old functions around the objective, optimizer, files and logs, called as other programs call them."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library import custom_train_functions, huggingface_util, train_util, utils
from library.diffusion.samplers import make_sampler
from library.diffusion.schedule import make_schedule
from library.messages import UserError
from tests.conftest import GOLDEN, load_json

PORCHES = ("train_util", "custom_train_functions", "huggingface_util", "utils")
WEIGHTS = load_json(GOLDEN / "training_weights.json")
NAMES = load_json(GOLDEN / "training_names.json")


@pytest.mark.parametrize("name", PORCHES)
def test_every_entry_resolves(name):
    module = importlib.import_module(f"library.{name}")
    assert [entry for entry in module.NAMES if getattr(module, entry) is None] == []


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_scheduler_preparation_and_weights(zero_terminal):
    scheduler = make_sampler("ddpm")
    custom_train_functions.prepare_scheduler_for_custom_training(scheduler, "cpu")
    snr = scheduler.all_snr
    if zero_terminal:
        custom_train_functions.fix_noise_scheduler_betas_for_zero_terminal_snr(scheduler)
    custom_train_functions.prepare_scheduler_for_custom_training(scheduler, "cpu")
    assert scheduler.all_snr is snr
    schedule = make_schedule(zero_terminal_snr=zero_terminal)
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod)
    torch.testing.assert_close(scheduler.betas, schedule.betas)

    timesteps, ones = torch.tensor(WEIGHTS["timesteps"]), torch.ones(len(WEIGHTS["timesteps"]))
    prefix = "zero_terminal." if zero_terminal else ""
    ours = {
        "min_snr_gamma_5": custom_train_functions.apply_snr_weight(ones, timesteps, scheduler, 5.0),
        "scale_v_pred_loss_like_noise_pred": (
            custom_train_functions.scale_v_prediction_loss_like_noise_prediction(ones, timesteps, scheduler)
        ),
    }
    if not zero_terminal:
        ours["snr_scale"] = custom_train_functions.get_snr_scale(timesteps, scheduler)
        ours["v_pred_like_loss_1"] = custom_train_functions.add_v_prediction_like_loss(ones, timesteps, scheduler, 1.0)
    for name, values in ours.items():
        torch.testing.assert_close(values, torch.tensor(WEIGHTS["weights"][prefix + name]), rtol=1e-5, atol=1e-7)
    later = load_json(GOLDEN / "training_later.json")
    timesteps, ones = torch.tensor(later["timesteps"]), torch.ones(len(later["timesteps"]))
    for v_prediction, name in ((False, "debiased"), (True, "debiased_v")):
        debiased = custom_train_functions.apply_debiased_estimation(ones, timesteps, scheduler, v_prediction)
        torch.testing.assert_close(debiased, torch.tensor(later["weights"][name]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_and_timesteps_from_a_namespace(dtype):
    args = SimpleNamespace(noise_offset=0.1, min_timestep=300, max_timestep=310)
    latents = torch.randn(3, 4, 8, 8).to(dtype)
    torch.manual_seed(1)
    noise, noisy, timesteps = train_util.get_noise_noisy_latents_and_timesteps(args, make_sampler("ddpm"), latents)
    assert noise.dtype == noisy.dtype == dtype
    assert set(timesteps.tolist()) <= set(range(300, 310))
    expected = make_schedule().add_noise(latents.float(), noise.float(), timesteps)
    torch.testing.assert_close(noisy.float(), expected, rtol=2e-3, atol=5e-3)
    torch.manual_seed(1)
    assert torch.equal(train_util.get_noise_noisy_latents_and_timesteps(args, make_sampler("ddpm"), latents)[0], noise)


def test_noise_functions():
    noise = torch.randn(2, 4, 16, 16)
    coarse = custom_train_functions.pyramid_noise_like(noise, "cpu", iterations=6, discount=0.3)
    assert coarse.shape == noise.shape
    assert coarse.std().item() == pytest.approx(1)
    assert custom_train_functions.apply_noise_offset(noise, noise, None, None) is noise
    moved = custom_train_functions.apply_noise_offset(noise, noise, 0.5, None) - noise
    assert moved.std(dim=(2, 3)).max() < 1e-5 < moved.abs().min()


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_conditional_loss_takes_both_orders(loss_type):
    pred, target, c = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.2, 0.3])
    each = train_util.conditional_loss(pred, target, "none", loss_type, c)
    assert each.shape == pred.shape
    assert torch.equal(train_util.conditional_loss(pred, target, loss_type, "none", c), each)
    assert torch.equal(
        train_util.conditional_loss(pred, target, reduction="none", loss_type=loss_type, huber_c=c), each
    )
    assert torch.equal(train_util.conditional_loss(pred, target, loss_type, "mean", c), each.mean())
    assert torch.equal(train_util.conditional_loss(pred, target, "sum", loss_type, c), each.sum())


def test_huber_threshold_and_timesteps():
    scheduler, timesteps = make_sampler("ddpm"), torch.tensor([0, 500])
    plain = SimpleNamespace(loss_type="l2")
    assert train_util.get_huber_threshold_if_needed(plain, timesteps, scheduler) is None
    huber = SimpleNamespace(loss_type="huber", huber_schedule="constant", huber_c=0.3, huber_scale=2.0)
    threshold = train_util.get_huber_threshold_if_needed(huber, timesteps, scheduler)
    torch.testing.assert_close(threshold, torch.tensor([0.6, 0.6]))
    assert train_util.get_timesteps(10, 10, 3, "cpu").tolist() == [10, 10, 10]
    assert set(train_util.get_timesteps(10, 12, 50, "cpu").tolist()) == {10, 11}


def test_masked_loss():
    golden = load_json(GOLDEN / "training_later.json")["masked"]
    loss = torch.tensor(golden["loss"]).reshape(golden["loss_shape"])
    images = torch.tensor(golden["conditioning_images"]).reshape(golden["conditioning_shape"])
    alpha = torch.tensor(golden["alpha_masks"]).reshape(2, 8, 8)
    masked = custom_train_functions.apply_masked_loss(loss, {"conditioning_images": images, "alpha_masks": alpha})
    torch.testing.assert_close(masked.flatten(), torch.tensor(golden["result_conditioning"]))
    masked = custom_train_functions.apply_masked_loss(loss, {"alpha_masks": alpha})
    torch.testing.assert_close(masked.flatten(), torch.tensor(golden["result_alpha"]))
    assert custom_train_functions.apply_masked_loss(loss, {}) is loss


def test_optimizer_changes_the_namespace_as_before():
    args = SimpleNamespace(
        optimizer_type="AdaFactor",
        learning_rate=1e-3,
        lr_scheduler="cosine",
        unet_lr=1e-4,
        text_encoder_lr=1e-5,
        max_train_steps=10,
        max_grad_norm=1.0,
    )
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1e-4}]
    name, text, optimizer = train_util.get_optimizer(args, groups)
    assert (name, text) == ("transformers.optimization.Adafactor", "relative_step=True")
    assert (args.learning_rate, args.lr_scheduler) == (None, "adafactor:0.001")
    assert (args.unet_lr, args.text_encoder_lr) == (None, None)
    assert train_util.get_scheduler_fix(args, optimizer, 1).get_last_lr() == [1e-3]

    args = SimpleNamespace(learning_rate=1e-3, lr_scheduler="linear", max_train_steps=10)
    _, _, optimizer = train_util.get_optimizer(args, [torch.nn.Parameter(torch.ones(2))])
    schedule = train_util.get_scheduler_fix(args, optimizer, 2)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([5e-4])
    assert (args.learning_rate, args.lr_scheduler) == (1e-3, "linear")


def namespace(folder, **options):
    base = {"output_dir": str(folder), "output_name": None, "save_state": False, "save_every_n_epochs": None}
    return SimpleNamespace(**{**base, "save_every_n_steps": None, **options})


@pytest.mark.parametrize("index", range(len(NAMES["names"])))
def test_file_names(index):
    case = NAMES["names"][index]
    make = getattr(train_util, f"get_{case['kind']}_ckpt_name")
    number = [case["no"]] if "no" in case else []
    assert make(SimpleNamespace(output_name=case["output_name"]), case["ext"], *number) == case["name"]


@pytest.mark.parametrize("index", range(len(NAMES["simulations"])))
def test_simulated_runs(index, tmp_path):
    """Saves of the model scripts: files, folders and states after each event, numbers told to the writer."""
    case = NAMES["simulations"][index]
    args = namespace(tmp_path, **case["options"])
    told = []

    def sd_saver(file, epoch, step):
        Path(file).write_text("x")
        told.append((epoch, step))

    printed = []
    accelerator = SimpleNamespace(print=printed.append, save_state=lambda folder: Path(folder).mkdir(exist_ok=True))
    layout = case["stability_layout"], case["use_safetensors"]
    for event in case["events"]:
        unit, _, number = event["after"].partition(" ")
        told.clear()
        step = event.get("step_in_file", 0)
        if unit == "end":
            if args.save_state:
                train_util.save_state_on_train_end(args, accelerator)
            epochs = case["epochs"] - 1
            train_util.save_sd_model_on_train_end_common(args, *layout, epochs, step, sd_saver, lambda folder: None)
        else:
            at_epoch = unit == "epoch"
            epoch = int(number) - 1 if at_epoch else event.get("epoch_in_file", 0)
            step = step if at_epoch else int(number)
            train_util.save_sd_model_on_epoch_end_or_stepwise_common(
                args, at_epoch, accelerator, *layout, epoch, case["epochs"], step, sd_saver, lambda folder: None
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == event["dir"], event["after"]
        if "epoch_in_file" in event and case["stability_layout"]:
            assert told == [(event["epoch_in_file"], event["step_in_file"])]
    assert all("saving checkpoint" in text for text in printed)


def test_resume(tmp_path, monkeypatch):
    from library.training import classic_training

    loaded = []
    accelerator = SimpleNamespace(load_state=loaded.append)
    train_util.resume_from_local_or_hf_if_specified(accelerator, SimpleNamespace(resume=None))
    local = SimpleNamespace(resume="x-state", resume_from_huggingface=False)
    train_util.resume_from_local_or_hf_if_specified(accelerator, local)
    monkeypatch.setattr(classic_training, "download_state", lambda text, token: tmp_path / text)
    remote = SimpleNamespace(resume="u/r/x", resume_from_huggingface=True, huggingface_token="t")
    train_util.resume_from_local_or_hf_if_specified(accelerator, remote)
    assert loaded == ["x-state", str(tmp_path / "u/r/x")]


def test_rates_in_logs():
    groups = [{"lr": 0.1, "d": 0.5}, {"lr": 0.2, "d": 2.0}]
    schedule = SimpleNamespace(get_last_lr=lambda: [0.1, 0.2], optimizers=[SimpleNamespace(param_groups=groups)])
    logs = {"loss": 1.0}
    train_util.append_lr_to_logs(logs, schedule, "Prodigy")
    assert logs == {
        "loss": 1.0,
        "lr/unet": 0.1,
        "lr/text_encoder1": 0.2,
        "lr/d*lr/unet": 0.05,
        "lr/d*lr/text_encoder1": 0.4,
    }


def test_trackers():
    calls = []
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda *args, **kwargs: calls.append((args, kwargs))
    )
    train_util.init_trackers(accelerator, SimpleNamespace(log_config=True, seed=1, output_dir="x"), "finetuning")
    assert calls == [(("finetuning",), {"config": {"log_config": True, "seed": 1}, "init_kwargs": {}})]
    assert train_util.get_sanitized_config_or_none(SimpleNamespace(seed=1)) is None


def test_upload_goes_where_the_suffix_says(monkeypatch, tmp_path):
    from library.training import hub

    sent = []
    monkeypatch.setattr(hub, "_make_repository", lambda config: None)
    monkeypatch.setattr(hub, "_upload", lambda config, path, destination: sent.append((path.name, destination)))
    args = SimpleNamespace(huggingface_repo_id="u/r", huggingface_path_in_repo="dir")
    huggingface_util.upload(args, tmp_path / "a.ckpt", "/b.ckpt", True)
    huggingface_util.upload(args, tmp_path / "a.ckpt")
    assert sent == [("a.ckpt", "dir/b.ckpt"), ("a.ckpt", "dir/a.ckpt")]


def test_fire_in_thread():
    done = threading.Event()
    utils.fire_in_thread(lambda event, flag: event.set(), done, flag=True)
    assert done.wait(5)


def test_zero_windows_are_refused(tmp_path):
    args = namespace(tmp_path, save_every_n_epochs=1, save_last_n_epochs=0)
    with pytest.raises(UserError, match="save_last_n_epochs"):
        train_util.get_remove_epoch_no(args, 3)
    args.save_last_n_epochs = 2
    assert [train_util.get_remove_epoch_no(args, epoch) for epoch in (1, 2, 5)] == [None, 0, 3]
    steps = namespace(tmp_path, save_every_n_steps=10, save_last_n_steps=30)
    assert [train_util.get_remove_step_no(steps, step) for step in (30, 40, 80)] == [None, 0, 40]
