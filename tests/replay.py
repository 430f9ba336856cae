"""Replays recorded runs of the original and prints one line a case; exit 1 when a tolerance is exceeded.

    python -m tests.replay tests/reference/training/sd15_lora tests/reference/generation

A folder is one case, or holds cases. Formats and tolerances: tests/reference/README.md and
tests/reference/generation/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import unpack_model


def cases_in(folder: Path) -> list[Path]:
    """The folder itself, or the cases in it."""
    if (folder / "case.json").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/case.json"))


def replay(folder: Path, models: Path, scratch: Path) -> Any:
    """Run one case: a training if it holds a recorded trace, else a picture."""
    from tests import replay_generation, replay_training

    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    model = unpack_model(case["family"], models)
    kind = replay_training if (folder / "trace.safetensors").is_file() else replay_generation
    return kind.replay_case(folder, model, scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    folders = [case.resolve() for folder in args.folders for case in cases_in(folder)]
    if not folders:
        print("no case.json in these folders", file=sys.stderr)
        return 1
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        models = Path(work) / "models"
        models.mkdir()
        for number, folder in enumerate(folders):
            scratch = Path(work) / str(number)
            scratch.mkdir()
            try:
                report = replay(folder, models, scratch)
            except Exception as error:
                print(f"FAIL {folder.name}: {type(error).__name__}: {error}")
                failed += 1
                continue
            print(report.line(), flush=True)
            failed += not report.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
