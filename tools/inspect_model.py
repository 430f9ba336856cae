"""Say what a model or network file is; docs/models.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.messages import run
from library.options.parser import build_parser, parse, resolve

SCRIPT = "tools/inspect_model.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def inspect(args: argparse.Namespace) -> None:
    """Describe the file or folder that a namespace names."""
    options = resolve(args, SCRIPT).model_inspect
    import json

    from library.messages import write
    from library.models.checkpoint import open_checkpoint
    from library.models.converting import find_source
    from library.models.describing import as_lines, describe_model
    from networks.describing import describe_network, is_network

    path = find_source(options.model)
    opened = open_checkpoint(path) if path.is_file() else None
    description = describe_network(opened) if opened and is_network(opened) else describe_model(path)
    write(json.dumps(description, indent=4) if options.json else "\n".join(as_lines(description)))


if __name__ == "__main__":
    run(lambda: inspect(parse(SCRIPT)))
