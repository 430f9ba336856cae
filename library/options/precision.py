"""Number formats, attention backend and memory."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats, attention backend and memory."""

    mixed_precision: str = option("no", "", choices=("no", "fp16", "bf16"))
    full_fp16: bool = option(False, "")
    full_bf16: bool = option(False, "")
    fp8_base: bool = option(False, "")
    fp8_base_unet: bool = option(False, "")
    mem_eff_attn: bool = option(False, "")
    xformers: bool = option(False, "")
    sdpa: bool = option(False, "")
    gradient_checkpointing: bool = option(False, "")
    cpu_offload_checkpointing: bool = option(False, "")
    torch_compile: bool = option(False, "")
    dynamo_backend: str = option(
        "inductor",
        "",
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
    lowram: bool = option(False, "")
    highvram: bool = option(False, "")
