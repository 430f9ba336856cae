"""Say what a training would make of its pictures and captions, before anything is trained; docs/datasets.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse

SCRIPT = "tools/inspect_dataset.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script: its own options, and those of every training script."""
    return build_parser(SCRIPT)


def inspect(args: argparse.Namespace) -> None:
    """Print the report and write its page."""
    import json

    from library.data.inspection_page import make_page
    from library.data.inspection_text import lines_of
    from library.messages import log, write
    from library.options.data_inspect import DataInspectConfig
    from library.options.declare import from_namespace
    from library.runtime.files import atomic_write
    from library.training.data_inspection import inspect_options, training_options

    asked = from_namespace(DataInspectConfig, args)
    options = training_options(args, asked.script, SCRIPT)
    facts, group = inspect_options(options, processes=asked.processes, read_pictures=not asked.no_duplicates)
    write(json.dumps(facts, ensure_ascii=False, indent=2) if asked.json else "\n".join(lines_of(facts)))
    if asked.page:
        page = make_page(facts, group, pictures_per_bucket=asked.pictures_per_bucket)
        with atomic_write(asked.page, "w", encoding="utf-8") as file:
            file.write(page.html())
        log.info("the page is %s", Path(asked.page).resolve())


if __name__ == "__main__":
    run(lambda: inspect(parse(SCRIPT)))
