"""Number formats, attention backend and memory."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats, attention backend and memory."""

    mixed_precision: str = option(
        "no", "number format of the computations: no (float32), fp16 or bf16", choices=("no", "fp16", "bf16")
    )
    full_fp16: bool = option(False, "hold what is trained in float16 too; needs --mixed_precision fp16")
    full_bf16: bool = option(False, "hold what is trained in bfloat16 too; needs --mixed_precision bf16")
    fp8_base: bool = option(False, "hold the frozen base model in 8-bit floats; needs --mixed_precision")
    fp8_base_unet: bool = option(False, "hold only the frozen U-Net in 8-bit floats; needs --mixed_precision")
    mem_eff_attn: bool = option(False, "old name of --sdpa, whose kernels need little memory; wins over --xformers")
    xformers: bool = option(False, "attention by the xformers package; wins over --sdpa")
    sdpa: bool = option(False, "attention by torch's own scaled_dot_product_attention, which is the default")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass, for less memory and about a third more time"
    )
    gradient_checkpointing_interval: int = option(
        1, "checkpoint every N-th block only: less memory saved, less time lost; needs --gradient_checkpointing"
    )
    cpu_offload_checkpointing: bool = option(
        False, "keep the checkpointed activations in CPU memory; needs --gradient_checkpointing"
    )
    nan_policy: str = option(
        "stop",
        "at a loss or gradient that is not a finite number: stop with the state before it, or skip that update",
        choices=("stop", "skip"),
    )
    torch_compile: bool = option(False, "compile the model's repeated blocks with torch.compile")
    dynamo_backend: str = option(
        "inductor",
        "backend of --torch_compile",
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
    )
    lowram: bool = option(False, "load models straight to the device, for machines with little CPU memory")
    highvram: bool = option(False, "keep the device's memory cache, for devices with much memory")

    @property
    def halves_trained(self) -> bool:
        """What is trained is held in half precision too."""
        return self.full_fp16 or self.full_bf16
