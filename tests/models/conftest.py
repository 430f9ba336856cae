"""The small models of the golden data: their weights follow a rule, so a test makes the files itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


def ruled_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """The value that models.md 12.2 gives to a Stability key."""
    if key.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    x = np.random.RandomState(seed).standard_normal(shape)
    last = key.rpartition(".")[2]
    if key.endswith("logit_scale"):
        x = np.array(4.6052)
    elif last in ("bias", "in_proj_bias"):
        x = 0.02 * x
    elif key.endswith("token_embedding.weight"):
        x = 0.5 * x
    elif key.endswith("position_embedding.weight") or last == "positional_embedding":
        x = 0.25 * x
    elif last == "text_projection":
        x = x / np.sqrt(shape[0])
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@pytest.fixture(scope="session")
def ruled_model(golden: Path, shared_folder: Path):
    """`sd1`, `sd2`, `sdxl` -> path of the small model's Stability file, tensors checked against recorded sums."""
    recorded = json.loads(gzip.decompress((golden / "models_tiny_keys.json.gz").read_bytes()))["models"]

    def make(name: str) -> Path:
        path = shared_folder / f"ruled_{name}.safetensors"
        if not path.exists():
            tensors = {}
            for key, (shape, checksum) in recorded[name]["keys"].items():
                tensors[key] = ruled_tensor(key, shape)
                assert hashlib.sha256(tensors[key].numpy().tobytes()).hexdigest()[:8] == checksum, key
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(tensors, partial)
            partial.replace(path)
        return path

    return make
