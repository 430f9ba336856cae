"""Training with DeepSpeed (ZeRO): gradients and optimizer state, at stage 3 the weights too, lie spread.

DeepSpeed needs none of its engine's forward pass: its hooks sit on parameters and modules, so the loop calls the
models as always and hands it backward passes and updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.messages import UserError
from library.runtime.parallel import Copies, Loader, Tensors, with_values, without_values

if TYPE_CHECKING:
    from library.options.distributed import DistributedConfig
    from library.runtime.processes import Processes


class Zero(Copies):
    """DeepSpeed's engine around the trained modules.

    Args:
        processes: of the run.
        config: the options of DeepSpeed.
        batch_size, accumulation: of the run; max_grad_norm: 0 for no limit.
        weights: their number format, `no` (float32), `fp16` or `bf16`.
    """

    spread = True

    def __init__(
        self,
        processes: Processes,
        config: DistributedConfig,
        *,
        batch_size: int,
        accumulation: int,
        max_grad_norm: float,
        weights: str,
    ) -> None:
        self.processes = processes
        self.stage = config.zero_stage
        if self.stage == 3 and accumulation > 1:
            raise UserError(
                "--zero_stage 3 with --gradient_accumulation_steps above 1", "use --zero_stage 2, or a larger batch"
            )
        self.accumulation = accumulation
        self.settings = settings(config, batch_size, accumulation, max_grad_norm, weights)
        self.engine: Any = None
        self.base: Any = None
        self.skeletons: dict[str, nn.Module] = {}

    def place(self, modules: Mapping[str, nn.Module], block_classes: tuple[str, ...]) -> None:
        if self.stage == 3 and set(modules) != {"unet"}:
            # transformers look at the shapes of weights that are elsewhere
            raise UserError("--zero_stage 3 trains a U-Net alone", "train no text encoder, or use --zero_stage 2")
        for name, module in modules.items():
            if self.stage == 3 and self.processes.is_main:
                self.skeletons[name] = without_values(module)
            module.to(memory_format=torch.contiguous_format)  # weights travel as flat memory

    def take_optimizer(self, optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        deepspeed = import_deepspeed()
        self.base = optimizer
        self.engine, _, _, _ = deepspeed.initialize(
            model=nn.ModuleList(modules), optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        return EngineOptimizer(self.engine, optimizer)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self.accumulation > 1:
            self.engine.set_gradient_accumulation_boundary(last)
            loss = loss * self.accumulation  # the engine divides by it again
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-step; updates nothing

    def average(self, average: Any, processes: Processes) -> None:
        """The engine has averaged them."""

    def clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor | None:
        """The engine clips while it updates; the norm is known only then."""
        return None

    def module_state(self, module: nn.Module) -> Tensors:
        found = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            with self._gathered([tensor]):
                if self.processes.is_main:
                    found[name] = tensor.detach().cpu().clone()
        return {name: found[name] for name in module.state_dict() if name in found}

    def load_module(self, module: nn.Module, state: Tensors) -> None:
        with self._gathered(list(module.parameters()), change=True):
            if self.stage < 3 or self.processes.is_main:
                module.load_state_dict(state)

    def _gathered(self, tensors: list[torch.Tensor], *, change: bool = False) -> contextlib.AbstractContextManager[Any]:
        spread = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        if not spread:
            return contextlib.nullcontext()
        return import_deepspeed().zero.GatheredParameters(spread, modifier_rank=0 if change else None)

    def whole_module(self, name: str, module: nn.Module) -> nn.Module | None:
        if self.stage < 3:
            return module if self.processes.is_main else None
        state = self.module_state(module)
        return with_values(self.skeletons[name], state) if self.processes.is_main else None

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The parts of all processes; a state is resumed by as many."""
        own = {
            "moments": [dict(self.base.state.get(part, {})) for part in self._master_parts()],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.base.param_groups],
            "weights": [part.detach().cpu() for part in self._master_parts()],
        }
        parts: list[Any] = [None] * self.processes.count
        torch.distributed.all_gather_object(parts, own)
        return {"zero_stage": self.stage, "parts": parts}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], load: Loader) -> None:
        if state.get("zero_stage") != self.stage or len(state["parts"]) != self.processes.count:
            raise UserError(
                "the state was made with another --zero_stage or number of processes",
                "resume with the same launch, or start again from the saved model",
            )
        own = state["parts"][self.processes.rank]
        for part, stored in zip(self._master_parts(), own["moments"], strict=True):
            self.base.state[part] = {k: v.to(part.device) if torch.is_tensor(v) else v for k, v in stored.items()}
        for group, stored in zip(self.base.param_groups, own["groups"], strict=True):
            group.update(stored)
        with torch.no_grad():
            for part, stored in zip(self._master_parts(), own["weights"], strict=True):
                part.copy_(stored)

    def _master_parts(self) -> list[torch.Tensor]:
        """This process's weights that the optimizer updates, in order."""
        inner = self.engine.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(inner, name):
                return list(getattr(inner, name))
        return [parameter for group in self.base.param_groups for parameter in group["params"]]


class EngineOptimizer:
    """What the loop needs of an optimizer, done by the engine; rates stand in the groups of the plain optimizer."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine has dropped them."""


def settings(
    config: DistributedConfig, batch_size: int, accumulation: int, max_grad_norm: float, weights: str
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        config: the options of DeepSpeed.
        batch_size, accumulation: of each process; max_grad_norm: 0 for no limit.
        weights: their number format, `no`, `fp16` or `bf16`.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    for kind in ("optimizer", "param"):
        device = getattr(config, f"offload_{kind}_device")
        if device:
            place = {"device": device}
            if path := getattr(config, f"offload_{kind}_nvme_path"):
                place["nvme_path"] = path
            zero[f"offload_{kind}"] = place
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if weights != "no":
        found[weights] = {"enabled": True}
        if weights == "fp16":
            found[weights]["fp16_master_weights_and_grads"] = config.fp16_master_weights_and_gradients
    return found


def import_deepspeed() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"--deepspeed: the package cannot be imported ({error})", "pip install deepspeed") from error
    return deepspeed
