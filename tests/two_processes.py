"""Runs a training script in two processes on the CPU (gloo), and writes what each rank trained.

    python -m tests.two_processes SCRIPT RANK PORT FOLDER OPTION ...

is one of the two; `run_both` starts them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]


def run_both(script: str, options: list[str], folder: Path, environment: dict[str, str] | None = None) -> list[dict]:
    """What each of two processes holds after the run: names -> tensors; both must end without an error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(2):
        command = [sys.executable, "-m", "tests.two_processes", script, str(rank), str(port), str(folder), *options]
        env = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    failed = [text for process, text in zip(started, outputs, strict=True) if process.returncode]
    assert not failed, failed[0][-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def run_one(script: str, rank: int, port: int, folder: Path, options: list[str]) -> None:
    """Train as one rank and keep what was trained."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    from library.training import loop
    from tests.training.runs import train as train_script

    runs, train = [], loop.train

    def watched(run) -> None:
        train(run)
        runs.append(run)

    loop.train = watched
    train_script(script, options)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in runs[0].target.state_dict().items()}
    save_file(state, folder / f"rank{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # the threads of a process group do not always end in good order


if __name__ == "__main__":
    run_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
