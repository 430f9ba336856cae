"""Said before the first step: memory and disk that a run needs; and after the first steps, what has not moved."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.messages import UserError, log
from library.options.parser import parse, resolve
from library.options.remedies import memory_remedies
from library.options.saving import SavingConfig
from library.runtime.shape_memory import LiveBytes
from library.training import assemble, disk_need
from library.training.disk_need import DiskNeed, require_room
from library.training.memory_need import memory_need
from library.training.network_trainer import NetworkTrainer
from library.training.recipes.network import NetworkRecipe
from library.training.sdxl_network_trainer import SdxlNetworkTrainer
from tests.options.test_every_option_counts import MODEL_TRAIN, TRAIN
from tests.training.test_resume import weights

BF16 = ("--mixed_precision", "bf16")
PARTS = {
    "plain": (),
    "checkpointing": ("--gradient_checkpointing",),
    "bfloat16": BF16,
    "8-bit base, checkpointing": (*BF16, "--fp8_base", "--gradient_checkpointing"),
    "U-Net only": ("--network_train_unet_only",),
}


def measured(run) -> int:
    """Peak of the tensors that a real step makes."""
    model, target = run.target.model, run.target
    modules = [model.unet, *model.text_encoders, model.vae, *target.extra_modules()]
    run.position.micro = 0
    plan = run.feed.plan(1)
    largest = max(range(len(plan)), key=lambda i: plan.batches[0][i].bucket[0] * plan.batches[0][i].bucket[1])
    batch = list(run.feed.batches(plan, 0, 0))[largest]
    batch["latents"] = torch.zeros(2, 4, *(side // 8 for side in plan.batches[0][largest].bucket[::-1]))
    with LiveBytes([t for m in modules for t in (*m.parameters(), *m.buffers())]) as live:
        target.compute_loss(run, batch, run.feed.place(1, largest))[0].backward()
    return live.peak


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_memory_is_what_a_step_takes(command, options: tuple[str, ...]) -> None:
    args = parse("train_network.py", command(*options))
    trainer = NetworkTrainer()
    trainer.run = run = assemble.build_run(NetworkRecipe(trainer), args)
    need = memory_need(run, resolve(args))
    assert need is not None
    model = run.target.model
    modules = (model.unet, model.vae, *model.text_encoders, run.target.network)
    held = sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))
    assert need.weights == held
    trained = sum(p.numel() for p in run.target.trainable_parameters())
    assert need.moments == 8 * trained
    assert measured(run) == pytest.approx(need.step + need.text, rel=0.35)


def test_memory_of_sdxl(command, tiny_sdxl: Path) -> None:
    model = ("--pretrained_model_name_or_path", str(tiny_sdxl))
    args = parse("sdxl_train_network.py", command(*model, "--network_train_unet_only"))
    trainer = SdxlNetworkTrainer()
    trainer.run = run = assemble.build_run(NetworkRecipe(trainer), args)
    need = memory_need(run, resolve(args, "sdxl_train_network.py"))
    assert measured(run) == pytest.approx(need.step, rel=0.35)


def test_a_dry_run_says_what_is_needed(train, caplog: pytest.LogCaptureFixture) -> None:
    log.propagate = True
    with caplog.at_level("INFO", logger=log.name):
        train("--dry_run", "--save_every_n_steps", "1", "--save_state", steps=4)
    lines = [record.getMessage().strip() for record in caplog.records]
    memory = next(line for line in lines if line.startswith("memory: about"))
    assert "a step with 2 pictures of 96x96" in memory
    saves = next(line for line in lines if line.startswith("saves: "))
    assert saves.startswith("saves: 5 x ")
    assert " and 5 x " in saves
    assert saves.endswith(" free")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 0),
        ({"save_every_n_steps": 10}, 10),
        ({"save_every_n_steps": 10, "save_last_n_steps": 20}, 4),
        ({"save_every_n_epochs": 1}, 4),
        ({"save_every_n_epochs": 2, "save_last_n_epochs": 1}, 2),
        ({"save_every_n_epochs": 1, "save_every_n_steps": 50}, 6),
    ],
)
def test_files_that_lie_there_at_once(options: dict, kept: int) -> None:
    assert disk_need._kept(SavingConfig(**options), 100, 5, state=False) == kept


def test_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    log.propagate = True
    require_room(DiskNeed(file=10**6, state=0, files=3, states=0, free=10**8), str(tmp_path))
    assert not caplog.text
    require_room(DiskNeed(file=40 * 10**6, state=0, files=3, states=0, free=10**8), str(tmp_path))
    assert "--save_last_n_epochs" in caplog.text
    with pytest.raises(UserError, match="not enough room"):
        require_room(DiskNeed(file=10**9, state=0, files=1, states=0, free=10**8), str(tmp_path))


class Idle(NetworkTrainer):
    """Nothing of the U-Net reaches the loss."""

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **options):
        return noisy_latents + text_conds.mean()


@pytest.mark.parametrize("options", [(), ("--lr_warmup_steps", "2", "--lr_scheduler", "constant_with_warmup"), BF16])
def test_parts_that_move_are_not_mentioned(train, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]) -> None:
    log.propagate = True
    train(*options, steps=4)
    assert "has changed" not in caplog.text


@pytest.mark.parametrize("steps", [2, 12])
def test_parts_that_do_not_move_are_named(train, caplog: pytest.LogCaptureFixture, steps: int) -> None:
    log.propagate = True
    out = train(steps=steps, trainer=Idle())
    said = [record.getMessage() for record in caplog.records if "has changed" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("unet: none of its weights has changed in ")
    assert "rate 0.001" in said[0]
    assert any(t.any() for key, t in weights(out).items() if key.startswith("lora_te") and "lora_up" in key)


@pytest.mark.parametrize(
    ("script", "argv", "first", "without"),
    [
        ("train_network.py", "", "--gradient_checkpointing", "--cpu_offload_checkpointing"),
        ("train_network.py", "--gradient_checkpointing", "--mixed_precision bf16", "--gradient_checkpointing"),
        (
            "train_network.py",
            "--gradient_checkpointing --mixed_precision bf16 --cache_latents --train_batch_size 4",
            "a smaller --train_batch_size with more --gradient_accumulation_steps",
            "--full_bf16",
        ),
        (
            "train_network.py",
            "--gradient_checkpointing --mixed_precision bf16 --cache_latents --optimizer_type AdamW8bit",
            "--fp8_base_unet",
            "--optimizer_type AdamW8bit",
        ),
        (
            "train_db.py",
            "--gradient_checkpointing --mixed_precision bf16 --cache_latents",
            "--full_bf16",
            "--fp8_base_unet",
        ),
    ],
)
def test_remedies_are_ranked(script: str, argv: str, first: str, without: str) -> None:
    base = MODEL_TRAIN if script == "train_db.py" else TRAIN
    remedies = memory_remedies(resolve(parse(script, [*base, *argv.split()]), script))
    assert remedies[0] == first
    assert without not in remedies
    assert 3 <= len(remedies) <= 6


def test_running_out_of_memory_names_what_helps(train) -> None:
    class Large(NetworkTrainer):
        def call_unet(self, *arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(UserError, match="out of memory while training") as caught:
        train("--gradient_checkpointing", trainer=Large())
    assert caught.value.remedy.startswith("try, the most helpful first: --mixed_precision bf16; --cache_latents; ")


def test_a_foreign_model_only_lacks_the_estimate() -> None:
    assert memory_need(SimpleNamespace(), SimpleNamespace()) is None


def test_lora_plus_trains_its_matrices_at_their_own_rate(train, caplog: pytest.LogCaptureFixture) -> None:
    """The up matrices in groups of their own, named in the block; the text encoder's ratio is its own."""
    log.propagate = True
    trainer = NetworkTrainer()
    ratios = ("loraplus_lr_ratio=4", "loraplus_text_encoder_lr_ratio=8")
    with caplog.at_level("INFO", logger=log.name):
        train("--network_args", *ratios, "--text_encoder_lr", "1e-4", trainer=trainer, steps=1)
    rates = dict(zip(trainer.run.log.group_names, (g["lr"] for g in trainer.run.optimizer.param_groups), strict=True))
    assert rates == pytest.approx({"textencoder": 1e-4, "textencoder plus": 8e-4, "unet": 1e-3, "unet plus": 4e-3})
    assert "unet plus: " in caplog.text


def test_a_rate_of_0_freezes(train, caplog: pytest.LogCaptureFixture) -> None:
    log.propagate = True
    trainer = NetworkTrainer()
    with caplog.at_level("INFO", logger=log.name):
        out = train("--text_encoder_lr", "0", trainer=trainer, steps=2)
    network = trainer.run.target.network
    assert not any(p.requires_grad for module in network.text_encoder_loras for p in module.parameters())
    assert "text encoder: rate 0, frozen" in caplog.text
    assert not any(t.any() for key, t in weights(out).items() if key.startswith("lora_te") and "lora_up" in key)


def test_a_rate_of_0_freezes_what_a_foreign_network_offers(train, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("lycoris")
    log.propagate = True
    trainer = NetworkTrainer()
    module = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "--unet_lr", "0")
    with caplog.at_level("INFO", logger=log.name):
        out = train(*module, trainer=trainer, steps=2)
    assert trainer.run.log.group_names == ["textencoder"]
    assert "rate 0, frozen" in caplog.text
    assert not any(t.any() for key, t in weights(out).items() if key.startswith("lora_unet") and "lora_up" in key)
