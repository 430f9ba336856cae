"""Networks on SDXL: caches, resume, rates of both text encoders, refusals, hooks in order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.data.text_file import SUFFIX
from library.messages import UserError
from library.training.sdxl_network_trainer import SdxlNetworkTrainer
from tests.training.conftest import PICTURES
from tests.training.test_resume import assert_equal, weights

MEMORY = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A copy of the training pictures, where cache files may be written."""
    return Path(shutil.copytree(PICTURES, tmp_path / "pictures"))


def parts(state: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Part of the model -> whether anything in it was learned."""
    learned: dict[str, bool] = {}
    for key, tensor in state.items():
        if key.endswith("lora_up.weight"):
            part = key.split("_")[1]
            learned[part] = learned.get(part, False) or bool(tensor.any())
    return learned


def test_all_parts_train_and_the_file_says_sdxl(train_sdxl) -> None:
    out = train_sdxl(steps=2)
    assert parts(weights(out)) == {"te1": True, "te2": True, "unet": True}
    with safe_open(out / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_one_step_trains_both_encoders_and_logs_their_rates(train_sdxl, tmp_path: Path) -> None:
    trainer = SdxlNetworkTrainer()
    out = train_sdxl("--text_encoder_lr", "2e-3", "0", trainer=trainer, steps=2)
    assert parts(weights(out)) == {"te1": True, "te2": False, "unet": True}
    assert trainer.run.log.group_names == ["textencoder 1", "unet"]
    assert [group["lr"] for group in trainer.run.optimizer.param_groups] == [2e-3, 1e-3]
    with safe_open(out / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_text_encoder_lr"] == "[0.002, 0.0]"


def test_as_many_rates_as_text_encoders(train_sdxl) -> None:
    with pytest.raises(UserError, match="--text_encoder_lr has 3 values, but the model has 2 text encoders"):
        train_sdxl("--text_encoder_lr", "1e-3", "1e-3", "1e-3")


def test_caches_change_nothing(train_sdxl, pictures: Path) -> None:
    """U-Net weights are the same with text encoded at every step, kept in memory, written, and read again."""
    data = ("--train_data_dir", str(pictures), "--cache_latents")
    plain = weights(train_sdxl(*data, "--network_train_unet_only", output="plain"))
    cached = weights(train_sdxl(*data, *MEMORY, output="memory"))
    written = weights(train_sdxl("--train_data_dir", str(pictures), *DISK, output="written"))
    files = sorted(pictures.rglob(f"*{SUFFIX}"))
    assert len(files) == 6
    times = [file.stat().st_mtime_ns for file in files]
    read = weights(train_sdxl("--train_data_dir", str(pictures), *DISK, output="read"))
    assert times == [file.stat().st_mtime_ns for file in files]
    assert parts(plain) == {"unet": True}
    # Captions are encoded in batches of another size: AdamW makes a step of the rounding where a gradient is nearly 0.
    assert set(plain) == set(cached)
    apart = torch.cat([(cached[key] - plain[key]).abs().flatten() for key in plain])
    assert (apart < 2e-5).float().mean() > 0.998
    assert_equal(cached, written)
    assert_equal(written, read)


def test_long_captions_are_cached_joined(train_sdxl, pictures: Path) -> None:
    import numpy as np

    train_sdxl("--train_data_dir", str(pictures), *DISK, "--max_token_length", "150", steps=1)
    for file in pictures.rglob(f"*{SUFFIX}"):
        with np.load(file) as arrays:
            assert arrays["hidden_state1"].shape == arrays["hidden_state2"].shape == (152, 64)


@pytest.mark.parametrize("options", [MEMORY, DISK, ()])
def test_stopped_twice_equals_uninterrupted(train_sdxl, pictures: Path, options: tuple[str, ...]) -> None:
    options = ("--train_data_dir", str(pictures), *options, "--lr_scheduler", "cosine", "--flip_aug")
    whole = weights(train_sdxl(*options, output="whole", steps=5))
    state = str(train_sdxl(*options, "--save_every_n_steps", "2", "--save_state", output="a", steps=5))
    middle = train_sdxl(
        *options,
        *("--save_every_n_steps", "1", "--save_state", "--resume", f"{state}/x-step00000002-state"),
        output="b",
        steps=5,
    )
    last = train_sdxl(*options, "--resume", str(middle / "x-step00000004-state"), output="c", steps=5)
    assert_equal(whole, weights(last))


def test_sample_pictures_change_nothing(train_sdxl, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1", encoding="utf-8")
    samples = ("--sample_every_n_steps", "1", "--sample_prompts", str(prompts))
    trainer = SdxlNetworkTrainer()
    a = weights(train_sdxl(*MEMORY, output="a", steps=2))
    b = weights(train_sdxl(*MEMORY, *samples, output="b", steps=2, trainer=trainer))
    assert_equal(a, b)
    assert len(list((tmp_path / "b" / "sample").glob("*.png"))) == 2
    for encoder in trainer.run.target.model.text_encoders:
        assert {(p.device.type, p.dtype) for p in encoder.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shuffle_caption",), "cannot be cached with shuffle_caption"),
        (("--caption_dropout_rate", "0.1"), "cannot be cached with caption_dropout_rate"),
        (("--caption_tag_dropout_rate", "0.1"), "cannot be cached with caption_tag_dropout_rate"),
        (("--token_warmup_step", "5"), "cannot be cached with token_warmup_step"),
        (("--bucket_reso_steps", "16"), "bucket_reso_steps is 16, but this model needs a multiple of 32"),
    ],
)
def test_refused_before_the_model_is_opened(train_sdxl, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_sdxl(*MEMORY, *options, "--pretrained_model_name_or_path", "does-not-exist")


def test_wrong_family_is_named(train_sdxl, tiny_sd15: Path) -> None:
    with pytest.raises(UserError, match=r"is a model of Stable Diffusion 1\.x"):
        train_sdxl("--pretrained_model_name_or_path", str(tiny_sd15))


class Release070(SdxlNetworkTrainer):
    """Notes every hook call, with the signatures of sd-scripts 0.7.0."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def load_tokenizer(self, args):
        self.calls.append("load_tokenizer")
        tokenizers = super().load_tokenizer(args)
        assert isinstance(tokenizers, list) and len(tokenizers) == 2
        return tokenizers

    def assert_extra_args(self, args, train_dataset_group):
        self.calls.append("assert_extra_args")
        super().assert_extra_args(args, train_dataset_group)

    def load_target_model(self, args, weight_dtype, accelerator):
        self.calls.append("load_target_model")
        version, encoders, vae, unet = super().load_target_model(args, weight_dtype, accelerator)
        assert self.load_stable_diffusion_format is True
        assert isinstance(encoders, list) and len(encoders) == 2
        return version, encoders, vae, unet

    def cache_text_encoder_outputs_if_needed(
        self, args, accelerator, unet, vae, tokenizers, text_encoders, dataset, weight_dtype
    ):
        self.calls.append("cache_text_encoder_outputs_if_needed")
        super().cache_text_encoder_outputs_if_needed(
            args, accelerator, unet, vae, tokenizers, text_encoders, dataset, weight_dtype
        )

    def get_text_cond(self, args, accelerator, batch, tokenizers, text_encoders, weight_dtype):
        self.calls.append("get_text_cond")
        hidden1, hidden2, pooled = super().get_text_cond(
            args, accelerator, batch, tokenizers, text_encoders, weight_dtype
        )
        return hidden1, hidden2, pooled

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        self.calls.append("call_unet")
        hidden1, hidden2, pooled = text_conds
        assert hidden1.shape[:2] == hidden2.shape[:2] and pooled.ndim == 2
        return super().call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizer, text_encoder, unet):
        self.calls.append(f"sample_images {epoch} {global_step}")
        assert len(tokenizer) == len(text_encoder) == 2


@pytest.mark.parametrize("options", [(), MEMORY])
def test_hooks_of_release_0_7_0(train_sdxl, options: tuple[str, ...]) -> None:
    trainer = Release070()
    train_sdxl(*options, trainer=trainer, steps=2)
    assert trainer.calls == [
        "load_tokenizer",
        "assert_extra_args",
        "load_target_model",
        "cache_text_encoder_outputs_if_needed",
        *("get_text_cond", "call_unet", "sample_images None 1"),
        *("get_text_cond", "call_unet", "sample_images None 2"),
        "sample_images 1 2",
    ]
    assert (trainer.vae_scale_factor, trainer.is_sdxl) == (0.13025, True)


class Release0100(SdxlNetworkTrainer):
    """Signatures of v0.10."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        self.calls.append("assert_extra_args")
        assert val_dataset_group is None
        super().assert_extra_args(args, train_dataset_group, val_dataset_group)

    def cache_text_encoder_outputs_if_needed(self, args, accelerator, unet, vae, text_encoders, dataset, weight_dtype):
        self.calls.append("cache_text_encoder_outputs_if_needed")
        for encoder in text_encoders:
            encoder.to(accelerator.device)

    def call_unet(
        self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, indices=None
    ):
        self.calls.append("call_unet")
        return super().call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)


def test_hooks_of_release_0_10_0(train_sdxl) -> None:
    trainer = Release0100()
    train_sdxl(trainer=trainer, steps=1)
    assert trainer.calls == ["assert_extra_args", "cache_text_encoder_outputs_if_needed", "call_unet"]


def test_an_override_that_caches_by_itself(train_sdxl) -> None:
    """A hook that calls the group's method directly, as classes written for 0.7.0 do."""

    class Own(SdxlNetworkTrainer):
        def cache_text_encoder_outputs_if_needed(
            self, args, accelerator, unet, vae, tokenizers, text_encoders, dataset, weight_dtype
        ):
            dataset.cache_text_encoder_outputs(
                tokenizers, text_encoders, accelerator.device, weight_dtype, False, accelerator.is_main_process
            )

    expected = weights(train_sdxl(*MEMORY, output="a", steps=2))
    assert_equal(weights(train_sdxl(*MEMORY, output="b", steps=2, trainer=Own())), expected)


def test_the_old_check_by_both_names_of_its_argument() -> None:
    from argparse import Namespace

    from library.options.sdxl import verify_sdxl_training_args

    def options(**changes: object) -> Namespace:
        plain = {"v2": False, "weighted_captions": False, "clip_skip": None, "cache_text_encoder_outputs": False}
        return Namespace(**{**plain, "cache_text_encoder_outputs_to_disk": True, **changes})

    for arguments in ({}, {"supportTextEncoderCaching": True}, {"support_text_encoder_caching": True}):
        args = options()
        verify_sdxl_training_args(args, **arguments)
        assert args.cache_text_encoder_outputs
    for arguments in ({"supportTextEncoderCaching": False}, {"support_text_encoder_caching": False}):
        args = options()
        verify_sdxl_training_args(args, **arguments)
        assert not args.cache_text_encoder_outputs
    with pytest.raises(UserError, match="--v2"):
        verify_sdxl_training_args(options(v2=True))


def test_half_precision_vae_falls_back_to_float32(train_sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that are not finite in the VAE's precision are computed again in float32 when they are cached."""
    from library.training import model_setup

    encode, calls = model_setup.encode, []

    def overflowing(vae, images, dtype, batch_size=0):
        calls.append(dtype)
        result = encode(vae, images, dtype, batch_size)
        if dtype != torch.float32:
            result.mean = torch.full_like(result.mean, float("nan"))
        return result

    monkeypatch.setattr(model_setup, "encode", overflowing)
    options = ("--mixed_precision", "bf16", *MEMORY)
    state = weights(train_sdxl(*options, output="a", steps=1))
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert set(calls) == {torch.bfloat16, torch.float32}
    calls.clear()
    train_sdxl(*options, "--no_half_vae", output="b", steps=1)
    assert set(calls) == {torch.float32}


class OverflowingVae(torch.nn.Module):
    """A VAE whose float16 latents are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def encode(self, images: torch.Tensor):
        from types import SimpleNamespace

        bad = self.dtype == torch.float16
        mean = torch.full((len(images), 4, 2, 2), float("nan") if bad else 1.0, dtype=self.dtype)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))


def test_the_same_at_every_step_without_a_cache() -> None:
    from library.training.draws import Draws, Place
    from library.training.latents import LatentEncoder

    vae, device = OverflowingVae(), torch.device("cpu")
    encode = LatentEncoder(vae, lambda latents: latents * 0.13025, Draws(0, device), device)
    latents = encode({"images": torch.zeros(2, 3, 16, 16), "image_keys": ["a", "b"]}, Place(1, 0, 0))
    assert torch.equal(latents, torch.full((2, 4, 2, 2), 0.13025)) and vae.dtype == torch.float16


def test_checkpointing_and_lowram_change_nothing(train_sdxl) -> None:
    plain = weights(train_sdxl(output="plain", steps=2))
    for number, options in enumerate([("--gradient_checkpointing",), ("--lowram",)]):
        other = weights(train_sdxl(*options, output=f"o{number}", steps=2))
        apart = torch.cat([(other[key] - plain[key]).abs().flatten() for key in plain])
        assert (apart < 2e-5).float().mean() > 0.998
        assert parts(other) == {"te1": True, "te2": True, "unet": True}


def test_text_in_the_weight_dtype(train_sdxl) -> None:
    """Under mixed precision cached text has its format, in memory and on its way to the U-Net."""
    seen = []

    class Watching(SdxlNetworkTrainer):
        def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
            seen.append({tensor.dtype for tensor in text_conds})
            assert batch["text_encoder_outputs1_list"].dtype == torch.bfloat16
            return super().call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)

    train_sdxl(*MEMORY, "--mixed_precision", "bf16", trainer=Watching(), steps=1)
    assert seen == [{torch.bfloat16}]
