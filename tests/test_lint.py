"""Style, spelling and import rules, as the tools see them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable

IMPORTS = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command"

COMMANDS = {
    "ruff check": [PYTHON, "-m", "ruff", "check", "--no-cache", "."],
    "ruff format": [PYTHON, "-m", "ruff", "format", "--check", "--no-cache", "."],
    "codespell": [PYTHON, "-m", "codespell_lib", "."],
    "import-linter": [PYTHON, "-c", f"{IMPORTS}; lint_imports_command(['--no-cache'])"],
}


@pytest.mark.parametrize("tool", sorted(COMMANDS))
def test_lint(tool: str) -> None:
    result = subprocess.run(COMMANDS[tool], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
