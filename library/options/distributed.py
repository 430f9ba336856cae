"""More than one process: DDP and DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """More than one process: DDP and DeepSpeed."""

    ddp_timeout: int | None = option(None, "")
    ddp_gradient_as_bucket_view: bool = option(False, "")
    ddp_static_graph: bool = option(False, "")
    deepspeed: bool = option(False, "")
    zero_stage: int = option(2, "", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(None, "", choices=(None, "cpu", "nvme"))
    offload_optimizer_nvme_path: str | None = option(None, "")
    offload_param_device: str | None = option(None, "", choices=(None, "cpu", "nvme"))
    offload_param_nvme_path: str | None = option(None, "")
    zero3_init_flag: bool = option(False, "")
    zero3_save_16bit_model: bool = option(False, "")
    fp16_master_weights_and_gradients: bool = option(False, "")
