"""One process, and two real ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from library import messages
from library.messages import UserError
from library.runtime import processes
from library.runtime.processes import Processes, start_processes

TWO = """
import json, sys, torch
from library import messages
from library.runtime import processes
p = processes.start_processes(cpu=True, ddp_timeout=1)
processes.MESSAGE_BYTES = 16  # several messages, one parameter larger than a message
a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 9))
frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
half = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
a.grad, c.grad = torch.full((3,), p.rank + 1.0), torch.arange(9.0) * (p.rank + 1)
half.grad = torch.ones(2, dtype=torch.float16) * p.rank
if p.rank == 1:
    b.grad = torch.ones(2)
p.all_reduce_gradients([a, b, c, frozen, half])
with p.in_turn():
    pass
print(json.dumps({
    "rank": p.rank, "count": p.count, "main": p.is_main, "quiet": messages.log.disabled,
    "gradients": [x.grad.tolist() for x in (a, b, c, half)], "frozen": frozen.grad is None,
    "mean": p.reduce_mean(torch.tensor([float(p.rank)])).tolist(),
}))
"""


def run_two() -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_average_gradients() -> None:
    first, second = run_two()
    expected = [[1.5] * 3, [0.5] * 2, [1.5 * n for n in range(9)], [0.5] * 2]
    assert first["gradients"] == second["gradients"] == expected
    assert first["mean"] == second["mean"] == [0.5]
    assert first["frozen"] and second["frozen"]
    assert (first["rank"], second["rank"], first["count"]) == (0, 1, 2)
    assert (first["main"], second["main"]) == (True, False)
    assert (first["quiet"], second["quiet"]) == (False, True)


def test_alone_nothing_is_copied_or_sent() -> None:
    alone = start_processes(cpu=True)
    assert (alone.rank, alone.local_rank, alone.count, alone.is_main) == (0, 0, 1, True)
    assert not messages.log.disabled
    value = torch.tensor(2.0)
    assert alone.reduce_mean(value) is value
    parameter = torch.nn.Parameter(torch.zeros(2))
    alone.all_reduce_gradients([parameter])
    assert parameter.grad is None
    with alone.in_turn():
        alone.barrier()


def test_ways_of_wrapping_that_are_not_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    class Deep:
        distributed_type = accelerate.DistributedType.DEEPSPEED

    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: Deep())
    with pytest.raises(UserError, match="add --deepspeed"):
        start_processes()


def test_precision_that_the_device_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    def refuse(**_):
        raise ValueError("fp16 mixed precision requires a GPU (not 'cpu').")

    monkeypatch.setattr(accelerate, "Accelerator", refuse)
    with pytest.raises(UserError, match="fp16"):
        start_processes(mixed_precision="fp16")


def test_a_second_run_may_use_another_precision() -> None:
    assert start_processes(cpu=True).accelerator.mixed_precision == "no"
    assert start_processes(cpu=True, mixed_precision="bf16").accelerator.mixed_precision == "bf16"
    assert start_processes(cpu=True, gradient_accumulation_steps=3).accelerator.gradient_accumulation_steps == 3


def test_messages_hold_one_dtype_and_keep_order() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in [(2, torch.float32), (3, torch.float16)] * 2]
    buckets = list(processes._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[2, 2], [3, 3]]
    assert isinstance(start_processes(cpu=True), Processes)
