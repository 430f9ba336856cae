"""More than one process: DDP and DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """More than one process: DDP and DeepSpeed."""

    ddp_timeout: int | None = option(None, "minutes that processes wait for each other")
    ddp_gradient_as_bucket_view: bool = option(False, "DDP: gradients share memory with the communication buffers")
    ddp_static_graph: bool = option(False, "DDP: the graph of the computation never changes")
    deepspeed: bool = option(False, "train with DeepSpeed")
    zero_stage: int = option(2, "DeepSpeed: ZeRO stage", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(
        None, "DeepSpeed: where the optimizer's state lies", choices=(None, "cpu", "nvme")
    )
    offload_optimizer_nvme_path: str | None = option(None, "DeepSpeed: NVMe folder for the optimizer's state")
    offload_param_device: str | None = option(
        None, "DeepSpeed: where the parameters lie", choices=(None, "cpu", "nvme")
    )
    offload_param_nvme_path: str | None = option(None, "DeepSpeed: NVMe folder for the parameters")
    zero3_init_flag: bool = option(
        False, "DeepSpeed: split models over the processes while they are loaded; ZeRO 3 only"
    )
    zero3_save_16bit_model: bool = option(False, "DeepSpeed: save 16-bit weights; ZeRO 3 only")
    fp16_master_weights_and_gradients: bool = option(
        False, "DeepSpeed: float16 master weights and gradients; ZeRO with CPU optimizer only"
    )
