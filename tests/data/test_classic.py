"""What third parties import and subclass: data-set classes with the original's constructors, `--dataset_class`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from library import train_util
from library.data.classic import (
    ImageInfo,
    ImageLoadingDataset,
    cache_batch_latents,
    collator_class,
    debug_dataset,
    image_transforms,
    load_foreign_dataset,
    load_image,
)
from library.data.group import DatasetGroup
from library.data.loader import make_loader
from library.messages import UserError
from library.training.classic_base import BaseDataset
from library.training.classic_datasets import ControlNetDataset, DreamBoothDataset, FineTuningDataset
from library.training.classic_minimal import MinimalDataset, load_arbitrary_dataset
from library.training.classic_subsets import ControlNetSubset, DreamBoothSubset, FineTuningSubset
from tests.data.conftest import block_means, make_files

COMMON = (3, False, 0, False, False, None, False, 0.0, 0, 0.0, None, None, 1, 0)
BUCKETS = (True, 64, 256, 64, False)


class BlockVae:
    """The parts of a diffusers VAE that caching uses."""

    device = torch.device("cpu")
    dtype = torch.float32

    def encode(self, pictures):
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(sample=lambda: block_means(pictures)))

    def state_dict(self):
        return {"weight": torch.ones(3)}


def dreambooth(shapes, **named):
    subset = DreamBoothSubset(str(shapes), False, "shape", "txt", *COMMON, **named)
    return DreamBoothDataset([subset], 2, None, None, (128, 128), *BUCKETS, 1.0, False)


def test_constructors_of_the_original_build_a_data_set(shapes, make_group):
    dataset = dreambooth(shapes)
    assert dataset.num_train_images == 18 and dataset.subsets[0].img_count == 6
    assert len(dataset.image_data) == 6 and len(dataset) == 0
    dataset.make_buckets()
    assert len(dataset) == 9
    group = DatasetGroup([dataset])
    own = make_group(shapes, num_repeats=3, class_tokens="shape", seed=0)
    plan = group.plan(5, 1)
    assert plan == own.plan(5, 1)
    for a, b in zip(make_loader(group, plan), make_loader(own, plan), strict=True):
        assert a["image_keys"] == b["image_keys"] and torch.equal(a["images"], b["images"])
        assert a["captions"] == b["captions"] and a["input_ids"] is None
    assert dataset.bucket_info == own.datasets[0].bucket_info


def test_the_other_kinds_take_their_arguments_in_order(tmp_path):
    files = {"d/a.png": [90, 70], "k/a.jpg": [90, 70], "d/a.txt": "x", "m.json": {"a": {"train_resolution": [64, 128]}}}
    make_files(tmp_path, files)
    subset = FineTuningSubset(str(tmp_path / "d"), str(tmp_path / "m.json"), *COMMON)
    tuning = FineTuningDataset([subset], 3, None, None, None, *BUCKETS, False)
    tuning.make_buckets()
    assert (tuning.num_train_images, subset.img_count) == (3, 1)
    assert tuning.enable_bucket and tuning.min_bucket_reso is None
    assert tuning[0]["images"].shape == (3, 3, 128, 64)
    pair = ControlNetSubset(str(tmp_path / "d"), str(tmp_path / "k"), "txt", *COMMON)
    pairs = ControlNetDataset([pair], 3, None, None, (64, 64), *BUCKETS, False)
    pairs.make_buckets()
    assert pairs.image_data[str(tmp_path / "d" / "a.png")].cond_img_path == str(tmp_path / "k" / "a.jpg")
    batch = pairs[0]
    assert batch["conditioning_images"].shape == batch["images"].shape and batch["captions"] == ["x"] * 3
    with pytest.raises(UserError, match="conditioning_data_dir"):
        ControlNetSubset("d", None, ".txt", *COMMON)


def test_turned_pictures_are_turned_here_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64)).save(tmp_path / "a.jpg", exif=exif)
    dataset = dreambooth(tmp_path)
    dataset.make_buckets()
    assert dataset.image_data[str(tmp_path / "a.jpg")].image_size == (64, 128)
    assert dataset[0]["original_sizes_hw"].tolist()[0] == [128, 64]


def test_later_keywords_are_taken_and_unknown_ones_refused(shapes):
    dataset = dreambooth(shapes, caption_separator=";", enable_wildcard=True)
    dataset.make_buckets()
    assert dataset.core.subsets[0].caption_separator == ";" and dataset.core.subsets[0].enable_wildcard
    with pytest.raises(TypeError, match="nonsense"):
        dreambooth(shapes, nonsense=1)


def test_sets_of_the_program_are_instances_of_the_old_classes(shapes, make_group):
    own = make_group(shapes).datasets[0]
    assert isinstance(own, DreamBoothDataset) and isinstance(own, BaseDataset)
    assert not isinstance(own, MinimalDataset)

    class Sub(DreamBoothDataset):
        pass

    assert not isinstance(own, Sub)
    assert not isinstance(dreambooth(shapes), Sub) and isinstance(dreambooth(shapes), DreamBoothDataset)


def test_a_subclass_may_change_pictures_before_buckets_are_made(shapes):
    class Doubled(DreamBoothDataset):
        def make_buckets(self):
            for info in self.image_data.values():
                info.num_repeats, info.caption = 1, "same"
            super().make_buckets()

    subset = DreamBoothSubset(str(shapes), False, None, ".txt", *COMMON)
    dataset = Doubled([subset], 6, None, None, (128, 128), *BUCKETS)
    dataset.make_buckets()
    group = DatasetGroup([dataset])
    captions = [c for batch in make_loader(group, group.plan(1, 1)) for c in batch["captions"]]
    assert captions == ["same"] * 6


def test_latents_of_such_a_set_are_cached(shapes):
    dataset = dreambooth(shapes)
    dataset.make_buckets()
    group = DatasetGroup([dataset])
    group.cache_latents(BlockVae(), 2, True, True)
    assert len(list(shapes.glob("*.npz"))) == 6
    batch = next(make_loader(group, group.plan(1, 1)))
    assert batch["images"] is None and batch["latents"].shape[1] == 4


def test_a_group_caches_sets_of_both_kinds(shapes, make_group):
    dataset = dreambooth(shapes)
    dataset.make_buckets()
    group = DatasetGroup([dataset, *make_group(shapes).datasets])
    group.cache_latents(BlockVae(), 2, False, True)
    for batch in make_loader(group, group.plan(1, 1)):
        assert batch["images"] is None and batch["latents"] is not None


class Ready(MinimalDataset):
    """A foreign data set of seven batches."""

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset=False):
        super().__init__(tokenizer, max_token_length, resolution, debug_dataset)
        self.num_train_images = 14
        self.batch_size = 2
        self.count = 7

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {
            "images": torch.full((2, 3, 8, 8), float(index)),
            "latents": None,
            "captions": [f"{index}", f"{self.current_epoch}"],
            "input_ids": torch.zeros(2, 1, 77),
            "loss_weights": 1,
        }


class Later(MinimalDataset):
    """The constructor of later versions."""

    def __init__(self, resolution, network_multiplier, debug_dataset=False):
        super().__init__(resolution=resolution, debug_dataset=debug_dataset, network_multiplier=network_multiplier)


class Plain(torch.utils.data.Dataset):
    """Not derived from ours."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture
def foreign(monkeypatch):
    module = types.ModuleType("foreign_sets")
    module.Ready, module.Later, module.Plain = Ready, Later, Plain
    monkeypatch.setitem(sys.modules, "foreign_sets", module)


def test_dataset_class_gives_its_own_batches(foreign):
    dataset = load_foreign_dataset("foreign_sets.Ready", tokenizer="t", max_token_length=150, resolution=(64, 48))
    assert dataset.tokenizers == ["t"] and (dataset.width, dataset.height) == (64, 48)
    assert dataset.max_token_length == 150 and dataset.datasets == [dataset] and dataset.image_dir == "dummy"
    assert not dataset.is_latent_cacheable()
    for group in (dataset, DatasetGroup([dataset])):
        plan = group.plan(1, 3)
        batches = list(make_loader(group, plan))
        assert sorted(batch["captions"][0] for batch in batches) == [str(i) for i in range(7)]
        assert {batch["captions"][1] for batch in batches} == {"3"}
        ranks = [list(make_loader(group, group.plan(1, 1, processes=2), rank=rank)) for rank in (0, 1)]
        assert [len(rank) for rank in ranks] == [4, 4]
    dataset.count = 3  # its length may change until the plan is made
    assert len(dataset.plan(1, 1)) == 3


def test_dataset_class_forms_and_refusals(foreign):
    later = load_foreign_dataset("foreign_sets.Later", tokenizer="t", resolution=(64, 64))
    assert (later.width, later.network_multiplier) == (64, 1.0)
    for name, word in [("Plain", "MinimalDataset"), ("Absent", "Absent")]:
        with pytest.raises(UserError, match=word):
            load_foreign_dataset(f"foreign_sets.{name}", tokenizer=None)
    with pytest.raises(UserError, match="no_such_module"):
        load_foreign_dataset("no_such_module.Set", tokenizer=None)
    with pytest.raises(UserError, match="module"):
        load_foreign_dataset("Set", tokenizer=None)
    args = argparse.Namespace(dataset_class="foreign_sets.Ready", max_token_length=None, resolution=(32, 32))
    assert load_arbitrary_dataset(args).width == 32


def test_collator_sets_epoch_and_step(shapes, make_group):
    group = make_group(shapes)
    epoch, step = multiprocessing.Value("i", 4), multiprocessing.Value("i", 9)
    assert collator_class(epoch, step, group)(["batch"]) == "batch"
    assert {(d.current_epoch, d.current_step) for d in group.datasets} == {(4, 9)}


def test_group_in_a_plain_loader(shapes, make_group):
    group = make_group(shapes)
    epoch, step = multiprocessing.Value("i", 1), multiprocessing.Value("i", 0)
    collate = collator_class(epoch, step, group)
    loader = torch.utils.data.DataLoader(group, batch_size=1, shuffle=True, collate_fn=collate)
    keys = [key for batch in loader for key in batch["image_keys"]]
    assert sorted(keys) == sorted(2 * [item.key for item in group.datasets[0].items])


def test_picture_loading_set_skips_broken_files(tmp_path, caplog):
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = ImageLoadingDataset([tmp_path / "good.png", tmp_path / "bad.png"])
    tensor, path = pictures[0]
    assert tensor.shape == (3, 3, 4) and tensor[0].max() == 1 and path.endswith("good.png")
    assert pictures[1] is None and "bad.png" in caplog.text


@pytest.mark.parametrize("to_disk", [False, True])
def test_caching_a_batch_of_records(tmp_path, to_disk):
    infos = []
    for name in ("a", "b"):
        Image.new("RGB", (96, 64)).save(tmp_path / f"{name}.png")
        info = ImageInfo(name, 1, "", False, str(tmp_path / f"{name}.png"))
        info.bucket_reso, info.resized_size, info.latents_npz = (64, 64), (96, 64), str(tmp_path / f"{name}.npz")
        infos.append(info)
    cache_batch_latents(BlockVae(), to_disk, infos, True, False)
    assert infos[0].latents_original_size == (96, 64)
    assert (tmp_path / "a.npz").exists() is to_disk
    if not to_disk:
        assert infos[1].latents.shape == infos[1].latents_flipped.shape == (4, 8, 8)


def test_small_helpers(tmp_path):
    Image.new("RGB", (2, 2), (255, 255, 255)).save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png").tolist() == np.full((2, 2, 3), 255).tolist()
    assert image_transforms(Image.open(tmp_path / "p.png")).tolist() == torch.ones(3, 2, 2).tolist()
    assert {".png", ".PNG", ".webp", ".JPEG"} <= set(train_util.IMAGE_EXTENSIONS)


def test_debugging_says_what_one_epoch_holds(shapes, make_group, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = make_group(shapes)
    with caplog.at_level("INFO"):
        debug_dataset(group, show_input_ids=True)
    assert caplog.text.count(".png") == 12 and "input_ids" in caplog.text
    assert "original size" in caplog.text and f"{len(group)} batches" in caplog.text


def test_old_names_lead_here():
    assert train_util.DreamBoothDataset is DreamBoothDataset and train_util.MinimalDataset is MinimalDataset
    assert train_util.DatasetGroup is DatasetGroup and train_util.debug_dataset is debug_dataset
    assert train_util.IMAGE_TRANSFORMS is image_transforms
    assert train_util.default_if_none(None, 3) == 3 and train_util.default_if_none(0, 3) == 0
