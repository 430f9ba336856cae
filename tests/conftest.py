"""Shared fixtures: the tiny models and recorded data that golden and replay tests use."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["SD_TOOLKIT_CACHE"] = ""  # tests leave nothing in the user's cache folder

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
REFERENCE = TESTS / "reference"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with inputs and outputs of the original's functions."""
    return GOLDEN


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with recorded runs of the original."""
    return REFERENCE


def unpack_model(name: str, folder: Path) -> Path:
    """Unpack `tests/reference/models/NAME.safetensors.xz` into `folder` (once, safe between processes)."""
    target = folder / f"{name}.safetensors"
    if not target.exists():
        partial = folder / f"{name}.{os.getpid()}.partial"
        partial.write_bytes(lzma.decompress((REFERENCE / "models" / f"{name}.safetensors.xz").read_bytes()))
        partial.replace(target)
    return target


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run share."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sd15(shared_folder: Path) -> Path:
    """The tiny SD 1.x model, one file in Stability layout."""
    return unpack_model("sd15", shared_folder)


@pytest.fixture(scope="session")
def tiny_sd21(shared_folder: Path) -> Path:
    """The tiny SD 2.x v-prediction model, one file in Stability layout."""
    return unpack_model("sd21", shared_folder)


@pytest.fixture(scope="session")
def tiny_sdxl(shared_folder: Path) -> Path:
    """The tiny SDXL model, one file in Stability layout."""
    return unpack_model("sdxl", shared_folder)


def load_json(path: Path) -> object:
    """Read a JSON golden file."""
    return json.loads(path.read_text(encoding="utf-8"))
