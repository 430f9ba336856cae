"""Options that save memory, in real trainings: 8-bit bases, activations in CPU memory, updates in the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.messages import UserError
from library.runtime.float8 import FLOAT8
from library.training.network_trainer import NetworkTrainer
from library.training.sdxl_network_trainer import SdxlNetworkTrainer
from tests.training.test_resume import assert_equal, weights

BF16 = ("--mixed_precision", "bf16")


def formats(trainer: NetworkTrainer) -> tuple[set[torch.dtype], ...]:
    """Of the matrices in U-Net and text encoders."""
    model = trainer.run.target.model
    return tuple({p.dtype for p in module.parameters() if p.dim() > 1} for module in (model.unet, *model.text_encoders))


@pytest.mark.parametrize(
    ("options", "small"),
    [
        (("--fp8_base", *BF16), (True, True)),
        (("--fp8_base_unet", *BF16), (True, False)),
        (BF16, (False, False)),
    ],
)
def test_8_bit_base(train, options: tuple[str, ...], small: tuple[bool, ...]) -> None:
    trainer = NetworkTrainer()
    out = train(*options, trainer=trainer, steps=3)
    assert tuple(FLOAT8 in one for one in formats(trainer)) == small
    assert any(tensor.any() for key, tensor in weights(out).items() if "lora_up" in key)
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_8_bit_base_learns_about_the_same(train) -> None:
    whole = weights(train(*BF16, output="whole", steps=3))
    small = weights(train("--fp8_base_unet", *BF16, output="small", steps=3))
    a, b = (
        torch.cat([t.float().flatten() for k, t in sorted(state.items()) if "lora" in k]) for state in (whole, small)
    )
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95


@pytest.mark.parametrize("method", ["networks.oft", "networks.dylora"])
def test_8_bit_base_under_other_methods(train, method: str) -> None:
    options = ("--network_module", method, "--network_dim", "4", "--network_train_unet_only")
    out = train(*options, "--fp8_base_unet", *BF16, steps=2)
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_8_bit_base_of_sdxl(train_sdxl) -> None:
    trainer = SdxlNetworkTrainer()
    out = train_sdxl("--fp8_base", *BF16, trainer=trainer, steps=2)
    assert all(FLOAT8 in one for one in formats(trainer))
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


@pytest.mark.parametrize("flag", ["--fp8_base", "--fp8_base_unet"])
def test_8_bit_base_needs_mixed_precision(train, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} without --mixed_precision"):
        train(flag)


def test_sample_pictures_of_an_8_bit_base(train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2", encoding="utf-8")
    out = train("--fp8_base", *BF16, "--sample_every_n_steps", "1", "--sample_prompts", str(prompts), steps=1)
    assert len(list((out / "sample").glob("*.png"))) == 1


@pytest.mark.parametrize("interval", ["1", "2"])
def test_activations_in_cpu_memory_change_nothing(train, monkeypatch: pytest.MonkeyPatch, interval: str) -> None:
    moved = []
    original = torch.autograd.graph.save_on_cpu

    def save_on_cpu(*arguments, **options):
        moved.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    options = ("--gradient_checkpointing", "--gradient_checkpointing_interval", interval)
    a = weights(train(*options, output="a", steps=2))
    assert not moved
    b = weights(train(*options, "--cpu_offload_checkpointing", output="b", steps=2))
    assert moved
    assert_equal(a, b)


KINDS = {
    "AdamW": ("--optimizer_type", "AdamW", "--unet_lr", "5e-4"),
    "Prodigy, two step sizes": ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--unet_lr", "0.5"),
    "schedule-free": ("--optimizer_type", "AdamWScheduleFree"),
    "AdamW in the backward pass": ("--optimizer_type", "AdamW", "--fused_backward_pass"),
    "AdaFactor in the backward pass": ("--optimizer_type", "AdaFactor", "--fused_backward_pass"),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_bfloat16_weights_resume_exactly(train, options: tuple[str, ...]) -> None:
    """Saving on the way changes nothing, also where evaluation uses other weights."""
    half = (*options, *BF16, "--full_bf16", "--network_train_unet_only")
    out = train(*half, "--save_state", "--save_every_n_steps", "1", output="whole", steps=3)
    rest = train(*half, "--resume", str(out / "x-step00000001-state"), output="rest", steps=3)
    assert_equal(weights(out), weights(rest))
    assert {tensor.dtype for key, tensor in weights(rest).items() if "lora_up" in key} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        ("--gradient_accumulation_steps", "2"),
        ("--mixed_precision", "fp16"),
    ],
)
def test_updates_in_the_backward_pass_are_refused(train, options: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"--fused_backward_pass with {options[0]}"):
        train("--fused_backward_pass", *options)
