"""How long it takes until something happens: `--help` of every script, and from the start to the first update.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tiny_run import small_model, tiny_run

ROOT = Path(__file__).parents[1]
HELP_LIMIT = 0.5
MARK = "first update done"
RUN_HELP = """
import runpy, sys
script = sys.argv[1]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    heavy = [name for name in ("torch", "transformers", "diffusers", "accelerate", "numpy") if name in sys.modules]
    print("\\nHEAVY", end.code or 0, *heavy)
"""
RUN_FIRST_STEP = f"""
import os, sys
from library.options.parser import parse
from library.training import loop
from library.training.network_trainer import NetworkTrainer
update = loop.update
def first(*arguments):
    update(*arguments)
    print("{MARK}", file=sys.stderr, flush=True)
    os._exit(0)
loop.update = first
NetworkTrainer().train(parse("train_network.py", sys.argv[1:]))
"""


def scripts() -> list[str]:
    """Every script with a command line: top level, tools, networks, finetune."""
    found = [path for folder in (".", "tools", "networks", "finetune") for path in sorted((ROOT / folder).glob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in found if "__main__" in path.read_text(encoding="utf-8")]


def help_of(script: str) -> tuple[int, list[str]]:
    """Exit code of `--help` and the heavy packages it imported."""
    command = [sys.executable, "-c", RUN_HELP, script]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    code, *heavy = out.rsplit("HEAVY", 1)[-1].split() or ["1"]
    return int(code), heavy


def seconds_of_help(script: str, repeats: int = 3) -> float:
    """Shortest wall time of `python SCRIPT --help`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def first_step(command: list[str]) -> tuple[float, float]:
    """(seconds from the start of Python to the end of the first update, seconds of these spent in imports)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", RUN_FIRST_STEP, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    imports, said = 0, []
    for line in process.stderr:
        if line.startswith(MARK):
            process.wait()
            return time.perf_counter() - start, imports / 1e6
        if timed := re.match(r"import time:\s+(\d+) \|", line):
            imports += int(timed[1])
        else:
            said.append(line)
    raise RuntimeError("the run ended before its first update:\n" + "".join(said[-20:]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for script in scripts():
        seconds, (code, heavy) = seconds_of_help(script), help_of(script)
        faults = [f"imports {', '.join(heavy)}"] if heavy else []
        faults += [f"exit code {code}"] if code else []
        faults += [f"over {HELP_LIMIT} s"] if seconds > HELP_LIMIT else []
        print(f"{script} --help: {seconds:.2f} s{', ' if faults else ''}{', '.join(faults)}")
    with tempfile.TemporaryDirectory() as folder:
        model = small_model()
        total, imports = first_step(tiny_run(Path(folder), 1, model))
    which = "the small model" if model else "the tiny model of the tests"
    print(f"start to first update on {which}: {total:.1f} s, imports {imports:.1f} s ({imports / total:.0%})")


if __name__ == "__main__":
    main()
