"""The processes of a run: who am I, how many are we, and what we do together. The one owner of accelerate.

Wrapped models are not used: gradients are averaged here, in a few large messages, after the backward passes of an
update, or where the weights are spread over the processes by what spreads them (`parallel.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from library.messages import UserError, set_quiet

if TYPE_CHECKING:
    import torch

MESSAGE_BYTES = 64 * 2**20


class Processes:
    """All processes of this run, around one `accelerate.Accelerator` (which third-party hooks receive).

    Attributes:
        accelerator: the Accelerator.
        shards: the launch asks for FSDP.
    """

    def __init__(self, accelerator: Any, shards: bool = False) -> None:
        self.accelerator = accelerator
        self.shards = shards
        set_quiet(not self.is_main)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def local_rank(self) -> int:
        return self.accelerator.local_process_index

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Automatic mixed precision, without keeping the casted weights: each is used once in a forward pass.

        Kept, they would lie beside float32 weights until the pass is over, half a model more.
        """
        from accelerate.utils import AutocastKwargs

        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the processes of a machine run the block one after the other (loading, to hold one copy at a time)."""
        together = int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if self.count > 1 else 1
        for _ in range(self.local_rank):
            self.barrier()
        yield
        for _ in range(together - self.local_rank):
            self.barrier()

    def reduce_mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes; with one process the tensor itself."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        _all_reduce(total)
        return total.div_(self.count)

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients of these parameters over all processes, in place, without a host read.

        A trained parameter without a gradient counts as zero, because another process may have one (dropped
        modules), and every process must send messages of the same sizes.
        """
        if self.count == 1:
            return
        import torch

        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            _all_reduce(flat)
            flat.div_(self.count)
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def start_processes(
    *,
    mixed_precision: str = "no",
    gradient_accumulation_steps: int = 1,
    log_with: str | None = None,
    project_dir: str | None = None,
    ddp_timeout: int | None = None,
    cpu: bool = False,
) -> Processes:
    """Join the processes that `accelerate launch` started, or be the only one.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; overrides the accelerate configuration.
        gradient_accumulation_steps: told to the Accelerator for hooks that read it.
        log_with, project_dir: trackers and their folder.
        ddp_timeout: minutes until a missing process is an error.
        cpu: stay on the CPU.

    Raises:
        UserError: the device cannot compute in this format, or the launch asks for a way of wrapping models
            that this program does not use.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState

    # Programs that train more than once in a process may ask for another precision each time.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # the Accelerator wraps nothing here, so it need not know
    shards = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    handlers = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = datetime.timedelta(minutes=ddp_timeout) if ddp_timeout else None
        backend = "gloo" if sys.platform == "win32" else None
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=project_dir,
            kwargs_handlers=handlers,
            cpu=cpu,
        )
    except ValueError as error:
        if "precision" not in str(error):
            raise
        remedy = "use --mixed_precision no" if mixed_precision == "bf16" else "use --mixed_precision bf16 or no"
        raise UserError(f"this device cannot compute in {mixed_precision}", remedy) from error
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if kind == "DEEPSPEED":
        raise UserError(
            "the accelerate configuration asks for DeepSpeed",
            "launch with --multi_gpu and add --deepspeed",
        )
    if kind in ("FSDP", "MEGATRON_LM", "TP"):
        raise UserError(f"the accelerate configuration asks for {kind}", "launch with --multi_gpu instead")
    return Processes(accelerator, shards)


def _all_reduce(value: torch.Tensor) -> None:
    import torch.distributed

    torch.distributed.all_reduce(value)


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in messages of one dtype and device and at most about `MESSAGE_BYTES`, in order."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        bucket, size = [], 0
        for parameter in group:
            bucket.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= MESSAGE_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
