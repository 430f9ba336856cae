"""Trainers written for any release of sd-scripts: the hooks are called in order, with their arguments, and count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.messages import UserError
from library.training.network_trainer import NetworkTrainer


class Recorder(NetworkTrainer):
    """Notes every hook call; subclasses have the signatures of one release."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def note(self, name: str) -> None:
        self.calls.append(name)


class Release070(Recorder):
    def load_tokenizer(self, args):
        self.note("load_tokenizer")
        return super().load_tokenizer(args)

    def assert_extra_args(self, args, train_dataset_group):
        self.note("assert_extra_args")
        assert len(train_dataset_group) == 3
        args.max_train_steps = 2
        super().assert_extra_args(args, train_dataset_group)

    def load_target_model(self, args, weight_dtype, accelerator):
        self.note("load_target_model")
        assert weight_dtype == torch.float32
        return super().load_target_model(args, weight_dtype, accelerator)

    def cache_text_encoder_outputs_if_needed(
        self, args, accelerator, unet, vae, tokenizers, text_encoders, data_loader, weight_dtype
    ):
        self.note("cache_text_encoder_outputs_if_needed")
        assert isinstance(tokenizers, list) and isinstance(text_encoders, list)
        super().cache_text_encoder_outputs_if_needed(
            args, accelerator, unet, vae, tokenizers, text_encoders, data_loader, weight_dtype
        )

    def is_text_encoder_outputs_cached(self, args):
        self.note("is_text_encoder_outputs_cached")
        return super().is_text_encoder_outputs_cached(args)

    def get_text_cond(self, args, accelerator, batch, tokenizers, text_encoders, weight_dtype):
        self.note("get_text_cond")
        return super().get_text_cond(args, accelerator, batch, tokenizers, text_encoders, weight_dtype)

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        self.note("call_unet")
        assert noisy_latents.shape[0] == timesteps.shape[0] == text_conds.shape[0] == len(batch["captions"])
        return super().call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizer, text_encoder, unet):
        self.note(f"sample_images {epoch} {global_step}")
        assert hasattr(tokenizer, "model_max_length") and hasattr(text_encoder, "text_model")

    def generate_step_logs(
        self, args, current_loss, avr_loss, lr_scheduler, keys_scaled=None, mean_norm=None, maximum_norm=None
    ):
        self.note("generate_step_logs")
        logs = super().generate_step_logs(
            args, current_loss, avr_loss, lr_scheduler, keys_scaled, mean_norm, maximum_norm
        )
        assert logs["loss/current"] == current_loss
        return {**logs, "extra": 1.0}


def test_release_0_7_0(train, tmp_path: Path) -> None:
    trainer = Release070()
    train("--logging_dir", str(tmp_path / "logs"), trainer=trainer, steps=40)
    start = [
        "load_tokenizer",
        "assert_extra_args",
        "load_target_model",
        "cache_text_encoder_outputs_if_needed",
        "is_text_encoder_outputs_cached",
    ]
    step = ["get_text_cond", "call_unet"]
    assert list(dict.fromkeys(trainer.calls))[: len(start) + 2] == start + step
    steps = trainer.calls[trainer.calls.index("get_text_cond") :]
    assert steps == [
        *(*step, "sample_images None 1", "generate_step_logs"),
        *(*step, "sample_images None 2", "generate_step_logs"),
        "sample_images 1 2",
    ]


class Release071(Recorder):
    def is_train_text_encoder(self, args):
        self.note("is_train_text_encoder")
        return False

    def all_reduce_network(self, accelerator, network):
        self.note("all_reduce_network")
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def test_release_0_7_1(train) -> None:
    from safetensors.torch import load_file

    trainer = Release071()
    weights = load_file(train(trainer=trainer, steps=2) / "x.safetensors")
    assert trainer.calls.count("all_reduce_network") == 2
    assert not any(key.startswith("lora_te") for key in weights)
    # the hook emptied every gradient, so nothing was learned
    assert all(not tensor.any() for key, tensor in weights.items() if key.endswith("lora_up.weight"))


class Release090(Recorder):
    def generate_step_logs(
        self,
        args,
        current_loss,
        avr_loss,
        lr_scheduler,
        lr_descriptions,
        keys_scaled=None,
        mean_norm=None,
        maximum_norm=None,
    ):
        self.note(f"generate_step_logs {lr_descriptions}")
        return super().generate_step_logs(
            args, current_loss, avr_loss, lr_scheduler, lr_descriptions, keys_scaled, mean_norm, maximum_norm
        )


def test_release_0_9_0(train, tmp_path: Path) -> None:
    trainer = Release090()
    train("--logging_dir", str(tmp_path / "logs"), trainer=trainer, steps=1)
    assert trainer.calls == ["generate_step_logs ['textencoder', 'unet']"]


class Release0100(Recorder):
    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        self.note("assert_extra_args")
        assert val_dataset_group is None

    def cache_text_encoder_outputs_if_needed(self, args, accelerator, unet, vae, text_encoders, dataset, weight_dtype):
        self.note("cache_text_encoder_outputs_if_needed")
        for encoder in text_encoders:
            encoder.to(accelerator.device)

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        self.note("post_process_network")

    def update_metadata(self, metadata, args):
        self.note("update_metadata")
        metadata["ss_mine"] = "yes"

    def on_step_start(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train=True):
        self.note("on_step_start")

    def get_noise_pred_and_target(
        self,
        args,
        accelerator,
        noise_scheduler,
        latents,
        batch,
        text_encoder_conds,
        unet,
        network,
        weight_dtype,
        train_unet,
        is_train=True,
    ):
        self.note("get_noise_pred_and_target")
        prediction, target, timesteps, _ = super().get_noise_pred_and_target(
            args,
            accelerator,
            noise_scheduler,
            latents,
            batch,
            text_encoder_conds,
            unet,
            network,
            weight_dtype,
            train_unet,
        )
        return prediction, target, timesteps, torch.zeros(latents.shape[0])

    def post_process_loss(self, loss, args, timesteps, noise_scheduler):
        self.note("post_process_loss")
        assert noise_scheduler.alphas_cumprod.shape == (1000,)
        assert not loss.any()
        return loss

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet):
        self.note("sample_images")
        assert isinstance(tokenizers, list)


def test_release_0_10_0(train) -> None:
    from safetensors import safe_open

    trainer = Release0100()
    out = train(trainer=trainer, steps=1)
    assert trainer.calls == [
        "assert_extra_args",
        "cache_text_encoder_outputs_if_needed",
        "post_process_network",
        "on_step_start",
        "get_noise_pred_and_target",
        "post_process_loss",
        "sample_images",
        "sample_images",
        "update_metadata",
    ]
    with safe_open(out / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_mine"] == "yes"


def test_process_batch_replaces_the_objective(train) -> None:
    from safetensors.torch import load_file

    class Constant(NetworkTrainer):
        def process_batch(self, batch, text_encoders, unet, network, *rest, **options):
            return 0.0 * sum(p.sum() for p in network.parameters())

    weights = load_file(train(trainer=Constant(), steps=2) / "x.safetensors")
    assert all(not tensor.any() for key, tensor in weights.items() if key.endswith("lora_up.weight"))


def test_method_assigned_on_the_class(train, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_network

    assert train_network.NetworkTrainer is NetworkTrainer
    seen = []
    monkeypatch.setattr(train_network.NetworkTrainer, "sample_images", lambda self, *a: seen.append(a[3]))
    train(steps=2)
    assert seen == [1, 2, 2]


def test_strategy_classes_are_refused(train) -> None:
    class Strategic(NetworkTrainer):
        def get_tokenize_strategy(self, args):
            raise AssertionError

    with pytest.raises(UserError, match=r"get_tokenize_strategy.*load_tokenizer"):
        train(trainer=Strategic())
