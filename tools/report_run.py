"""Make the page about a training from its record, also while it runs; docs/training.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/report_run.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def report(args: argparse.Namespace) -> None:
    """Write the pages of the trainings that a namespace names."""
    options = resolve(args, SCRIPT).run_report
    from library.messages import write
    from library.training.run_page import write_pages

    for page in write_pages(Path(options.folder), Path(options.page) if options.page else None):
        write(str(page))


if __name__ == "__main__":
    run(lambda: report(parse(SCRIPT)))
