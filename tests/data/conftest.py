"""A small data set on disk and the groups that tests make of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.group import DatasetGroup, build_group
from library.data.records import DatasetSettings, SubsetSettings
from library.data.sources import scan


def make_files(root: Path, files: dict) -> None:
    """Files in a folder: [w, h] a picture, a text, an object as JSON, ["npz", w, h, arrays] latents."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and content[0] == "npz":
            _, width, height, arrays = content
            latents = {name: np.full((4, height // 8, width // 8), len(arrays), np.float32) for name in arrays}
            np.savez(path, original_size=np.array([width, height]), crop_ltrb=np.zeros(4), **latents)
        elif isinstance(content, list):
            kind = {".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}.get(path.suffix.lower(), "PNG")
            Image.new("RGB", tuple(content)).save(path, kind)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


class ByteTokens:
    """Stands for a tokenizer: the bytes of the caption, padded. Can be sent to workers."""

    def __call__(self, caption: str) -> tuple[torch.Tensor, None]:
        ids = torch.zeros(1, 77, dtype=torch.int64)
        data = torch.tensor(list(caption.encode())[:77], dtype=torch.int64)
        ids[0, : len(data)] = data
        return ids, None


def block_means(pictures: torch.Tensor) -> torch.Tensor:
    """Stands for a VAE: means of 8x8 blocks, and the mean of the three as fourth channel."""
    means = torch.nn.functional.avg_pool2d(pictures, 8)
    return torch.cat([means, means.mean(1, keepdim=True)], 1)


@pytest.fixture
def shapes(tmp_path: Path, reference: Path) -> Path:
    """A copy of the six reference pictures with captions."""
    folder = tmp_path / "shapes"
    shutil.copytree(reference / "data" / "train" / "1_shape", folder)
    return folder


@pytest.fixture
def make_group():
    """group(folder, **subset settings) with data-set settings by name."""

    def make(folder: Path, *, sizes: tuple[int, ...] = (128,), seed: int = 7, **settings) -> DatasetGroup:
        names = {field.name for field in dataclasses.fields(SubsetSettings)} - {"kind"}
        own = {name: settings.pop(name) for name in list(settings) if name in names and name != "resize_interpolation"}
        own = {"caption_extension": ".txt", "num_repeats": 2, **own}
        given = {"batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, **settings}
        resolved = [
            DatasetSettings(resolution=(size, size), subsets=(SubsetSettings(image_dir=str(folder), **own),), **given)
            for size in sizes
        ]
        return build_group(resolved, [scan(one) for one in resolved], tokenize=ByteTokens(), seed=seed)

    return make


def same(a, b) -> bool:
    """Whether two batches are equal in every key."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def side_by_side(process: Callable, count: int = 2) -> list:
    """Results of `process(rank, wait)` run at once in threads that stand for processes."""
    barrier = threading.Barrier(count)

    def run(rank: int):
        try:
            return process(rank, lambda: barrier.wait(60))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
