"""Hashes of files and networks against the original's."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from library.models import hashes
from library.models.checkpoint_writer import save_tensors


def content(size: int) -> bytes:
    i = np.arange(size, dtype=np.int64)
    return ((31 * i + 7 * (i >> 8) + (i >> 16)) % 256).astype(np.uint8).tobytes()


def test_files(golden, tmp_path):
    recorded = json.loads((golden / "models_hash.json").read_text(encoding="utf-8"))
    assert recorded["cases"]
    for case in recorded["cases"]:
        path = tmp_path / str(case["size"])
        path.write_bytes(content(case["size"]))
        assert hashes.model_hash(path) == case["model_hash"]
        assert hashes.calculate_sha256(str(path)) == case["calculate_sha256"]
        assert hashes.file_hashes(path) == (case["model_hash"], case["calculate_sha256"])
    assert list(hashes.file_hashes(tmp_path / "none")) == recorded["missing"]
    assert [hashes.model_hash(tmp_path), hashes.calculate_sha256(tmp_path)] == recorded["directory"]


def tensors_of(case: dict) -> dict[str, torch.Tensor]:
    result = {}
    for name, spec in case["tensors"].items():
        if isinstance(spec["data"], str):
            assert spec["data"] == "element i = i mod 1000"
            data = torch.arange(spec["shape"][0]) % 1000
        else:
            data = torch.tensor(spec["data"])
        result[name] = data.to(getattr(torch, spec["dtype"])).reshape(spec["shape"])
    return result


def test_networks(golden):
    cases = json.loads((golden / "networks_hash.json").read_text(encoding="utf-8"))["cases"]
    assert cases
    for case in cases:
        got = hashes.network_hashes(tensors_of(case), case["metadata"])
        assert got == (case["sshs_model_hash"], case["sshs_legacy_hash"]), case["name"]


@pytest.mark.parametrize("size", [3, 300_000])
def test_network_hashes_are_those_of_the_written_file(tmp_path, size):
    tensors = {"a": torch.arange(size, dtype=torch.float32), "b": torch.ones(size).half(), "c": torch.tensor(4)}
    metadata = {"ss_x": "1", "other": "not in the hash"}
    save_tensors(tmp_path / "f.safetensors", tensors, {"ss_x": "1"})
    file = io.BytesIO((tmp_path / "f.safetensors").read_bytes())
    expected = hashes.safetensors_data_hash_of(file), hashes.legacy_hash_of(file)
    assert hashes.network_hashes(tensors, metadata) == expected
