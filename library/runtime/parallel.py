"""How the trained weights, their gradients and the optimizer's state lie on the processes of a run.

`Copies`, the default, holds everything on every process and averages gradients before an update. `Shards` gives
each process a part of every weight (FSDP 2, `torch.distributed.fsdp.fully_shard`), `library/runtime/zero.py` leaves
that to DeepSpeed. The loop, the saver and the state ask these methods and know no difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.messages import UserError

if TYPE_CHECKING:
    from library.runtime.processes import Processes

Tensors = dict[str, torch.Tensor]
Loader = Callable[[torch.optim.Optimizer, dict[str, Any]], None]


class Copies:
    """Every process holds everything.

    Attributes:
        spread: a process holds a part only, so that all of them must take part in saving and drawing.
    """

    spread = False

    def place(self, modules: Mapping[str, nn.Module], block_classes: tuple[str, ...]) -> None:
        """The trained modules are on their device, and no optimizer knows their parameters yet.

        Args:
            modules: names, as in `whole_module`, and modules.
            block_classes: class names of the blocks that computations go through one after the other.
        """

    def take_optimizer(self, optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """The optimizer that the run steps, made of the one over the modules' parameters."""
        return optimizer

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients of a micro-batch; `last`: an update follows."""
        loss.backward()

    def average(self, average: Callable[[Processes], None], processes: Processes) -> None:
        """Before an update: `average` brings the gradients of all processes together."""
        average(processes)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor | None:
        """Limit the norm of all gradients; returns it, a number on the device, or None without a limit."""
        return nn.utils.clip_grad_norm_(parameters, limit) if limit else None

    def module_state(self, module: nn.Module) -> Tensors:
        """A module's state with whole tensors; where weights are spread, on the CPU of the first process and empty
        on the others."""
        return module.state_dict()

    def load_module(self, module: nn.Module, state: Tensors) -> None:
        """Give a module the whole tensors of `state`, which every process has."""
        module.load_state_dict(state)

    def whole_module(self, name: str, module: nn.Module) -> nn.Module | None:
        """The module with whole weights, to write it; None on processes that do not write."""
        return module

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's whole state, as `module_state` gives it."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], load: Loader) -> None:
        """Give the optimizer a whole state; `load` does it for a plain optimizer."""
        load(optimizer, state)


class Shards(Copies):
    """Each process holds a part of every trained weight; they come together block by block while computing.

    Args:
        processes: of the run.
    """

    spread = True

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.skeletons: dict[str, nn.Module] = {}

    def place(self, modules: Mapping[str, nn.Module], block_classes: tuple[str, ...]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError as error:
            raise UserError("FSDP needs torch 2.6 or newer", "install it, or launch with --multi_gpu") from error

        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        for name, module in modules.items():
            if self.processes.is_main:
                self.skeletons[name] = without_values(module)
            module.to(memory_format=torch.contiguous_format)  # shards are cut from contiguous weights
            for block in list(module.modules()):
                if type(block).__name__ in block_classes:
                    fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def average(self, average: Callable[[Processes], None], processes: Processes) -> None:
        """The backward pass has averaged them."""

    def clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor | None:
        norm = super().clip(parameters, limit)
        return None if norm is None else norm.full_tensor()  # type: ignore[attr-defined]

    def module_state(self, module: nn.Module) -> Tensors:
        return self._whole(module.state_dict())

    def load_module(self, module: nn.Module, state: Tensors) -> None:
        own = module.state_dict()
        module.load_state_dict({k: _like(own[k], tensor) if k in own else tensor for k, tensor in state.items()})

    def whole_module(self, name: str, module: nn.Module) -> nn.Module | None:
        state = self.module_state(module)
        return with_values(self.skeletons[name], state) if self.processes.is_main else None

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        stored = optimizer.state_dict()
        return {**stored, "state": {number: self._whole_moments(one) for number, one in stored["state"].items()}}

    def _whole_moments(self, moments: dict[str, Any]) -> dict[str, Any]:
        tensors = {name: value for name, value in moments.items() if torch.is_tensor(value)}
        return {**{k: v for k, v in moments.items() if k not in tensors}, **self._whole(tensors)}

    def _whole(self, tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]
            if self.processes.is_main:
                found[name] = full.detach().cpu()
        return found

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], load: Loader) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        local = {
            number: {
                name: _like(parameters[number], value) if _has_shape(value, parameters[number]) else value
                for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        load(optimizer, {**state, "state": local})


def without_values(module: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes but no memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def with_values(skeleton: nn.Module, state: Tensors) -> nn.Module:
    """A copy of what `without_values` made, with the tensors of `state`."""
    module = copy.deepcopy(skeleton)
    module.load_state_dict(state, assign=True)
    return module


def _is_shard(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _has_shape(value: Any, parameter: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape and value.dim() > 0


def _like(own: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as `own` is."""
    if not _is_shard(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(own.device, own.dtype), own.device_mesh, own.placements)  # type: ignore[attr-defined]
