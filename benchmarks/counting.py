"""Count what torch dispatches: kernels and host reads. Machine-independent, so tests use it too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Copies nothing and launches nothing, though the schema does not mark it as a view.
_FREE = {
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::is_pinned",
    "aten::lift_fresh",
    "aten::resize_",
    "aten::set_",
    "aten::sym_size",
    "prim::device",
}
HOST_READ = "aten::_local_scalar_dense"


def _is_fetch(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """A copy from a device to the CPU that Python waits for."""
    if name == "aten::_to_copy":
        target, source = kwargs.get("device"), args[0]
    elif name == "aten::copy_":
        target, source = args[0].device, args[1]
    else:
        return False
    to_cpu = target is not None and torch.device(target).type == "cpu"
    return to_cpu and source.device.type not in ("cpu", "meta") and not kwargs.get("non_blocking")


def _is_view(schema: Any) -> bool:
    return any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


class OpCounter(TorchDispatchMode):
    """A context manager that counts every operator below autograd, forward and backward.

    Attributes:
        ops: operator name -> number of calls, views and allocations left out.
        host_reads: values that Python waited for (`.item()`, `bool(tensor)`, a copy from a device to the CPU).
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if schema.name == HOST_READ or _is_fetch(schema.name, args, kwargs or {}):
            self.host_reads += 1
        elif schema.name not in _FREE and not _is_view(schema):
            self.ops[schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Number of operators that compute or copy something."""
        return self.ops.total()


def count(work: Callable[[], Any]) -> OpCounter:
    """Run `work` once and return what it dispatched."""
    with OpCounter() as counter:
        work()
    return counter
