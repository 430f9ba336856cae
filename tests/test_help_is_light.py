"""`--help` of every script answers without torch or another heavy package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.options.scripts import SCRIPTS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "diffusers", "transformers", "accelerate", "cv2", "PIL", "rich", "toml")

PROBE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
sys.stdout.flush()
print("LOADED", *[name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help(script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "LOADED"
