"""Devices, number formats, memory and the one order of wrapping a model."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from library import messages
from library.messages import UserError
from library.models import unet_sd
from library.models.unet_config import UNetConfig
from library.runtime import devices, porch_adapters, precision
from library.runtime.memory import GarbageCollection, explained_out_of_memory, is_out_of_memory
from library.runtime.wrap import WrapPolicy, compile_blocks, wrap_model

SMALL = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    norm_num_groups=16,
    cross_attention_dim=32,
)
INPUTS = (
    torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
    torch.tensor([5]),
    torch.linspace(-1, 1, 320).reshape(1, 10, 32),
)


@pytest.mark.parametrize(
    ("present", "expected"),
    [(set(), "cpu"), ({"mps"}, "mps"), ({"xpu"}, "xpu"), ({"cuda"}, "cuda"), ({"cuda", "xpu"}, "cuda")],
)
def test_pick_device(monkeypatch: pytest.MonkeyPatch, present: set[str], expected: str) -> None:
    monkeypatch.setattr(devices, "is_available", lambda kind: kind == "cpu" or kind in present)
    assert devices.pick_device().type == expected
    assert devices.pick_device("cpu").type == "cpu"


def test_empty_cache_asks_the_device_and_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fake = types.SimpleNamespace(is_available=lambda: True, empty_cache=lambda: calls.append("xpu"))
    monkeypatch.setattr(torch, "xpu", fake)
    devices.empty_cache("xpu")
    devices.empty_cache("cpu")
    assert calls == ["xpu"]


def test_memory_of_the_process_follows_an_allocation() -> None:
    before = devices.memory_stats("cpu")
    # fresh pages from the system: an allocator may hand out memory that the process holds already
    block = mmap.mmap(-1, 64 * 2**20)
    block.write(b"x" * len(block))
    after = devices.memory_stats("cpu")
    block.close()
    if after.peak is not None:
        assert after.peak >= before.peak
    if after.used is not None:
        assert after.used - before.used > 32 * 2**20
        assert after.total > after.peak >= after.used


def test_words_of_precision() -> None:
    words = {None: torch.float32, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert {word: precision.weight_dtype(word) for word in words} == words
    assert precision.save_dtype(None) is None
    assert precision.save_dtype("float") == torch.float32
    with pytest.raises(UserError, match="fp8"):
        precision.weight_dtype("fp8")


def test_autocast_and_the_single_cast() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert precision.cast_once(x) is x
    with precision.autocast("cpu", torch.float32):
        assert layer(x).dtype == torch.float32
    with precision.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == precision.cast_once(x).dtype == torch.bfloat16
        assert precision.cast_once(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_half_gradients_may_be_unscaled() -> None:
    seen = []
    scaler = types.SimpleNamespace(_unscale_grads_=lambda *arguments: seen.append(arguments))
    porch_adapters.patch_accelerator_for_fp16_training(types.SimpleNamespace(scaler=scaler))
    scaler._unscale_grads_("optimizer", "scale", "found", False)
    assert seen == [("optimizer", "scale", "found", True)]


def test_prepare_dtype_of_a_namespace() -> None:
    args = types.SimpleNamespace(mixed_precision="bf16", save_precision="fp16")
    assert porch_adapters.prepare_dtype(args) == (torch.bfloat16, torch.float16)
    assert porch_adapters.prepare_dtype(types.SimpleNamespace()) == (torch.float32, None)


def test_replace_unet_modules_first_flag_wins() -> None:
    model = unet_sd.from_config(SMALL)
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    model.set_use_sdpa(False)
    porch_adapters.replace_unet_modules(model, False, False, False)
    assert attention.backend == "plain"
    porch_adapters.replace_unet_modules(model, True, True, False)
    assert attention.backend == "sdpa"


def test_prepare_accelerator_needs_a_folder_for_its_tracker() -> None:
    with pytest.raises(UserError, match="--logging_dir"):
        porch_adapters.prepare_accelerator(types.SimpleNamespace(log_with="tensorboard"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_names_three_options(error: BaseException) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(UserError, match="out of memory while training") as caught, explained_out_of_memory("training"):
        raise error
    assert caught.value.remedy == (
        "try --gradient_checkpointing, a smaller --train_batch_size or a smaller --resolution"
    )


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), UserError("other")])
def test_other_errors_are_not_called_out_of_memory(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explained_out_of_memory("training"):
        raise error


def test_garbage_is_collected_at_chosen_steps_only() -> None:
    collected = []
    callback = lambda phase, info: collected.append(info["generation"]) if phase == "start" else None  # noqa: E731
    with GarbageCollection(every=3) as collection:
        assert not gc.isenabled()
        gc.callbacks.append(callback)
        for number in range(1, 8):
            collection.step(number)
        gc.callbacks.remove(callback)
    assert len(collected) == 2
    assert gc.isenabled()


def test_wrapping_gives_the_same_result() -> None:
    torch.manual_seed(0)
    model = unet_sd.from_config(SMALL).train()
    expected = model(*INPUTS).sample.detach()
    policy = WrapPolicy(device="cpu", dtype=torch.float64, checkpointing_interval=2, compile_backend="eager")
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    assert wrap_model(model, policy, repeated_block_classes=blocks) is model
    assert model.dtype == torch.float64
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.is_gradient_checkpointing()
    keys = list(model.state_dict())
    sample, timesteps, context = INPUTS
    out = model(sample.double(), timesteps, context.double()).sample
    torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == keys, "compiling must not rename weights"


def test_checkpointing_of_foreign_models_is_switched_on_without_arguments() -> None:
    class Foreign(nn.Linear):
        def enable_gradient_checkpointing(self) -> None:
            self.on = True

    assert wrap_model(Foreign(1, 1), WrapPolicy(device="cpu", checkpointing_interval=1)).on


def test_a_compiler_that_fails_leaves_the_model_as_it_was() -> None:
    calls = []

    def broken(graph, examples):
        calls.append(graph)
        raise RuntimeError("no compiler here")

    model = unet_sd.from_config(SMALL).eval()
    expected = model(*INPUTS).sample
    assert compile_blocks(model, ("ResnetBlock2D",), broken, dynamic=False) == 8
    assert torch.equal(model(*INPUTS).sample, expected)
    assert calls


def test_compile_that_cannot_start_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self, **kwargs) -> None:
        raise RuntimeError("Dynamo is not supported on this Python")

    monkeypatch.setattr(nn.Module, "compile", refuse)
    monkeypatch.setattr(messages, "_said", set())
    assert compile_blocks(unet_sd.from_config(SMALL), ("ResnetBlock2D",), "inductor", dynamic=True) == 0
    assert "torch.compile is not possible here" in caplog.text


def test_runtime_imports_no_accelerate() -> None:
    code = (
        "import sys, library.runtime.processes, library.runtime.wrap, library.runtime.porch_adapters, "
        "library.runtime.files, library.runtime.memory; sys.exit('accelerate' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
