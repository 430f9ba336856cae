"""Host reads of each update of a real training run; between two log points there must be none.

python -m benchmarks.host_reads [options of train_network.py]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.counting import OpCounter
from benchmarks.tiny_run import tiny_run

STEPS = 24


def reads_per_update(train: Callable[[], None]) -> list[int]:
    """Host reads from each update to the next of the training that `train` does.

    Counted are forward, backward, update, logging, saving and fetching of the next batch.
    """
    from library.training import loop

    counter = OpCounter()
    marks: list[int] = []

    def marked(work: Callable[..., Any]) -> Callable[..., Any]:
        def update(*arguments: Any) -> Any:
            marks.append(counter.host_reads)
            return work(*arguments)

        return update

    original = loop.update
    loop.update = marked(original)
    try:
        with counter:
            train()
    finally:
        loop.update = original
    return [after - before for before, after in itertools.pairwise(marks)]


def train_network(command: list[str]) -> None:
    """A LoRA run with these options."""
    from library.options.parser import parse
    from library.training.network_trainer import NetworkTrainer

    NetworkTrainer().train(parse("train_network.py", command))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reads = reads_per_update(partial(train_network, [*tiny_run(Path(folder), STEPS), *sys.argv[1:]]))
    print(f"host reads from update to update: {' '.join(map(str, reads))}")
    print(f"quiet steps: {reads.count(0)} of {len(reads)}; reads per step on average: {sum(reads) / len(reads):.2f}")


if __name__ == "__main__":
    main()
