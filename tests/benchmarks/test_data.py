"""Memory of large data sets, as `benchmarks/data.py` measures it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.data import CAPTION, MEMORY


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_per_picture() -> None:
    count = 40_000
    command = [sys.executable, "-c", MEMORY, str(count), CAPTION]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout.split()[-1]) / count < 1500, "150 MB for 100,000 pictures"
