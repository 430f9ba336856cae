"""A small data set on disk and the groups that tests make of it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from library.data.group import DatasetGroup, build_group
from library.data.records import DatasetSettings, SubsetSettings
from library.data.sources import scan


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
