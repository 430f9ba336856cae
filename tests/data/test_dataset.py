"""Batches: their keys and shapes, what weights, masks and crops they carry."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.data import images
from library.data.batch import Batch
from library.data.cache import cache_latents
from library.data.group import build_group
from library.data.loader import make_loader
from library.data.plan import PlannedBatch
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.data.sources import scan
from library.messages import UserError
from tests.data.conftest import ByteTokens, block_means, same


def one_item_group(path, size, *, subset=None, repeats=1, **settings):
    resolved = DatasetSettings(subsets=(subset or SubsetSettings(image_dir="d"),), **settings)
    scan = ScanResult(items=[Item(str(path), str(path), "a caption", size, repeats)])
    return build_group([resolved], [scan], tokenize=ByteTokens(), seed=3)


def only_batch(group):
    (batch,) = make_loader(group, group.plan(3, 1))
    return batch


def write(path, size, mode="RGB"):
    width, height = size
    channels = len(mode)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels


def test_batch_has_the_exchanged_keys_and_shapes(shapes, make_group):
    group = make_group(shapes, batch_size=3, network_multiplier=0.5, custom_attributes={"a": 1})
    for batch in make_loader(group, group.plan(7, 1)):
        count = len(batch["captions"])
        assert set(batch) == set(Batch.__annotations__) - {"conditioning_images"}
        width, height = batch["images"].shape[-1], batch["images"].shape[-2]
        assert batch["images"].shape == (count, 3, height, width) and batch["images"].is_contiguous()
        assert batch["images"].dtype == torch.float32
        assert -1 <= batch["images"].min() < 0 < batch["images"].max() <= 1
        assert batch["latents"] is None and batch["alpha_masks"] is None and batch["input_ids2"] is None
        assert batch["input_ids"].shape == (count, 1, 77) and batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["loss_weights"], torch.ones(count))
        assert batch["target_sizes_hw"].tolist() == [[height, width]] * count
        for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            assert batch[name].shape == (count, 2) and batch[name].dtype == torch.int64
        assert batch["flippeds"] == [False] * count
        assert batch["network_multipliers"].tolist() == [0.5] * count
        assert batch["custom_attributes"] == [{"a": 1}] * count
        for i, caption in enumerate(batch["captions"]):
            assert bytes(batch["input_ids"][i, 0].tolist()).rstrip(b"\0") == caption.encode()[:77]


def test_size_numbers_equal_the_original(tmp_path, golden):
    """Every 12th case of the golden file, through a whole batch, normal and flipped."""
    crops = json.loads((golden / "datasets_crop.json").read_text(encoding="utf-8"))
    small = [c for c in crops["cases"] if max(c["bucket"]) <= 1024]
    compared = 0
    for case in small[::12]:
        config = crops["configs"][case["config"]]
        path = tmp_path / f"{compared}.png"
        Image.new("RGB", tuple(case["image"])).save(path)
        settings = {
            "resolution": tuple(config["resolution"]),
            "enable_bucket": config["enable_bucket"],
            "min_bucket_reso": config["min"],
            "max_bucket_reso": config["max"],
            "bucket_reso_steps": config["steps"],
            "bucket_no_upscale": config["no_upscale"],
        }
        group = one_item_group(
            path, tuple(case["image"]), subset=SubsetSettings(flip_aug=True), repeats=8, batch_size=8, **settings
        )
        batch = only_batch(group)
        assert set(batch["flippeds"]) == {True, False}
        for i, flipped in enumerate(batch["flippeds"]):
            told = case["flipped" if flipped else "normal"]
            assert batch["original_sizes_hw"][i].tolist() == told["original_size_hw"]
            assert batch["crop_top_lefts"][i].tolist() == told["crop_top_left"]
            assert batch["target_sizes_hw"][i].tolist() == told["target_size_hw"]
            assert list(batch["images"][i : i + 1].shape) == told["image_shape"]
        compared += 1
    assert compared >= 10


def test_flipped_pictures_are_mirrored(tmp_path):
    pixels = write(tmp_path / "p.png", (64, 64))
    group = one_item_group(
        tmp_path / "p.png", (64, 64), subset=SubsetSettings(flip_aug=True), repeats=8, batch_size=8, resolution=(64, 64)
    )
    batch = only_batch(group)
    straight = images.to_tensor(pixels)
    for picture, flipped in zip(batch["images"], batch["flippeds"], strict=True):
        assert torch.equal(picture, straight.flip(-1) if flipped else straight)
    assert batch["crop_top_lefts"].tolist() == [[0, 0]] * 8  # also where flipped


def test_regularisation_pictures_have_their_weight_and_subset(tmp_path):
    write(tmp_path / "t.png", (64, 64))
    write(tmp_path / "r.png", (64, 64))
    subsets = (SubsetSettings(caption_prefix="train"), SubsetSettings(is_reg=True, caption_prefix="prior"))
    settings = DatasetSettings(resolution=(64, 64), batch_size=2, prior_loss_weight=0.25, subsets=subsets)
    items = [
        Item(name, str(tmp_path / f"{name}.png"), name, (64, 64), is_reg=reg, subset=int(reg))
        for name, reg in (("t", False), ("r", True))
    ]
    group = build_group([settings], [ScanResult(items=items)], tokenize=None, seed=1)
    batch = only_batch(group)
    assert dict(zip(batch["captions"], batch["loss_weights"].tolist(), strict=True)) == {
        "train t": 1.0,
        "prior r": 0.25,
    }
    assert batch["input_ids"] is None


def test_alpha_masks_follow_the_picture(tmp_path):
    pixels = write(tmp_path / "p.png", (80, 64), "RGBA")
    subset = SubsetSettings(alpha_mask=True, flip_aug=True, color_aug=True)
    group = one_item_group(
        tmp_path / "p.png",
        (80, 64),
        subset=subset,
        repeats=8,
        batch_size=8,
        resolution=(64, 64),
        enable_bucket=True,
        min_bucket_reso=64,
        bucket_reso_steps=64,
    )
    batch = only_batch(group)
    mask = torch.from_numpy(pixels[:, 8:72, 3].astype(np.float32) / 255)
    for found, flipped in zip(batch["alpha_masks"], batch["flippeds"], strict=True):
        torch.testing.assert_close(found, mask.flip(-1) if flipped else mask)


def test_subsets_without_alpha_masks_count_whole(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", (64, 64), "RGBA")
    subsets = (SubsetSettings(alpha_mask=True), SubsetSettings())
    items = [Item(n, str(tmp_path / f"{n}.png"), "", (64, 64), subset=i) for i, n in enumerate("ab")]
    settings = DatasetSettings(resolution=(64, 64), batch_size=2, subsets=subsets)
    batch = only_batch(build_group([settings], [ScanResult(items=items)], tokenize=None, seed=1))
    masks = dict(zip(batch["image_keys"], batch["alpha_masks"], strict=True))
    assert masks["a"].min() < 1 and (masks["b"] == 1).all()


def test_face_crop_without_buckets(tmp_path):
    path = tmp_path / "p_300_200_120_140.png"
    write(path, (600, 500))
    subset = SubsetSettings(face_crop_aug_range=(1.0, 2.0))
    group = one_item_group(path, (600, 500), subset=subset, repeats=3, batch_size=3, resolution=(128, 128))
    batch = only_batch(group)
    assert batch["images"].shape == (3, 3, 128, 128)
    assert batch["original_sizes_hw"].tolist() == [[128, 128]] * 3
    assert not torch.equal(batch["images"][0], batch["images"][1])


def test_wrong_sizes_without_buckets_are_all_named_at_once(shapes, make_group):
    with pytest.raises(UserError, match="without buckets every picture must be 128x128") as caught:
        next(make_loader(group := make_group(shapes, enable_bucket=False), group.plan(7, 1)))
    for item in group.datasets[0].items:
        assert (item.path in str(caught.value)) is (item.size != (128, 128))


def test_interpolation_of_the_subset_comes_first(tmp_path):
    write(tmp_path / "p.png", (100, 100))

    def picture(subset, dataset):
        group = one_item_group(
            tmp_path / "p.png",
            (100, 100),
            subset=SubsetSettings(resize_interpolation=subset),
            resolution=(128, 128),
            enable_bucket=True,
            min_bucket_reso=64,
            resize_interpolation=dataset,
        )
        return only_batch(group)["images"]

    assert torch.equal(picture(None, None), picture("area", "nearest"))
    assert torch.equal(picture(None, "nearest"), picture("nearest", "cubic"))
    assert not torch.equal(picture(None, None), picture("nearest", None))


def test_group_counts_and_metadata(shapes, make_group):
    group = make_group(shapes, sizes=(128, 192), batch_size=4)
    assert group.num_train_images == 24 and group.num_reg_images == 0
    assert len(group) == len(group.plan(7, 1)) == sum(len(dataset) for dataset in group.datasets)
    dataset = group.datasets[0]
    buckets = dataset.bucket_info["buckets"]
    assert sum(bucket["count"] for bucket in buckets.values()) == 12
    assert set(dataset.tag_frequency) == {"shapes"}
    assert dataset.image_counts == [6]
    assert make_group(shapes, enable_bucket=False).datasets[0].bucket_info is None


def test_group_as_a_map_of_batches(shapes, make_group):
    group = make_group(shapes, sizes=(128, 192))
    group.set_current_epoch(2)
    keys = sorted(key for position in range(len(group)) for key in group[position]["image_keys"])
    assert keys == sorted(2 * 2 * [item.key for item in group.datasets[0].items])
    with pytest.raises(IndexError):
        group[len(group)]
    with pytest.raises(UserError, match="unpacked"):
        list(group)


@pytest.mark.parametrize(
    ("settings", "latents", "captions"),
    [
        ({}, True, True),
        ({"flip_aug": True}, True, True),
        ({"color_aug": True}, False, True),
        ({"random_crop": True}, False, True),
        ({"shuffle_caption": True}, True, False),
        ({"caption_dropout_rate": 0.1}, True, False),
        ({"caption_tag_dropout_rate": 0.1}, True, False),
        ({"token_warmup_step": 3}, True, False),
        ({"enable_wildcard": True}, True, True),
        ({"enable_wildcard": True, "caption_suffix": "{a|b|c|d}" * 4}, True, False),
    ],
)
def test_what_can_be_cached(shapes, make_group, settings, latents, captions):
    group = make_group(shapes, **settings)
    assert group.is_latent_cacheable() is latents
    assert group.is_text_encoder_output_cacheable() is captions


def test_bucket_steps_of_the_model(shapes, make_group):
    make_group(shapes, bucket_reso_steps=32).verify_bucket_reso_steps(32)
    make_group(shapes, enable_bucket=False, bucket_reso_steps=8).verify_bucket_reso_steps(32)
    with pytest.raises(UserError, match="bucket_reso_steps is 16"):
        make_group(shapes, bucket_reso_steps=16).verify_bucket_reso_steps(32)


def test_replacements_reach_the_captions(shapes, make_group):
    group = make_group(shapes)
    group.add_replacement("", ["a photo of zqx"])
    group.add_replacement("zqx", "zqx zqx1")
    captions = {c for batch in make_loader(group, group.plan(7, 1)) for c in batch["captions"]}
    assert captions == {"a photo of zqx zqx1"}


def test_a_group_with_latents_can_be_sent_to_spawned_workers(shapes, make_group):
    group = make_group(shapes, flip_aug=True)
    cache_latents(group.datasets, block_means)
    sent = pickle.loads(pickle.dumps(group))
    plan = group.plan(7, 1)
    assert all(same(a, b) for a, b in zip(make_loader(group, plan), make_loader(sent, plan), strict=True))
    storages = {entry.latents.untyped_storage().data_ptr() for entry in group.datasets[0].memory_latents}
    assert len(storages) == len(group.datasets[0].buckets.sizes)


def test_resolution_is_needed():
    with pytest.raises(UserError, match="resolution"):
        build_group([DatasetSettings()], [ScanResult()], tokenize=None, seed=0)


RECORDED = ["sd15_lora", "sd15_lora_conv_snr_accum", "sd15_lora_weighted_captions", "sd21_lora_v"]


@pytest.mark.parametrize("case", RECORDED)
def test_pictures_and_numbers_of_recorded_runs(reference, case):
    """Pictures, captions and sizes of the original's batches, read from the same files."""
    folder = reference / "training" / case
    recorded = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    trace = load_file(folder / "trace.safetensors")
    options = dict(zip(recorded["options"], [*recorded["options"][1:], ""], strict=True))
    width, height = map(int, options["--resolution"].split(","))
    settings = DatasetSettings(
        resolution=(width, height),
        enable_bucket=True,
        min_bucket_reso=int(options["--min_bucket_reso"]),
        max_bucket_reso=int(options["--max_bucket_reso"]),
        bucket_reso_steps=int(options["--bucket_reso_steps"]),
        subsets=(SubsetSettings(image_dir=str(reference / "data" / "train" / "1_shape"), caption_extension=".txt"),),
    )
    dataset = build_group([settings], [scan(settings)], tokenize=None, seed=0).datasets[0]
    names = [Path(item.path).name for item in dataset.items]
    compared = 0
    for number, step in enumerate(recorded["steps"]):
        items = tuple(names.index(Path(file).name) for file in step["image_files"])
        assert len({dataset.items[item].bucket for item in items}) == 1
        planned = PlannedBatch(0, dataset.items[items[0]].bucket, items, (0,) * len(items))
        batch = dataset.batch(planned, epoch=1, step=number)
        assert batch["captions"] == step["captions"]
        pooled = torch.nn.functional.avg_pool2d(batch["images"], 8)
        assert pooled.shape[-2:] == trace[f"step{number}.latents"].shape[-2:]
        if "--cache_latents" not in options:
            torch.testing.assert_close(pooled, trace[f"step{number}.images_pool8"].float(), atol=1e-3, rtol=0)
        for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            assert batch[name].tolist() == trace[f"step{number}.{name}"].tolist()
        assert batch["loss_weights"].tolist() == trace[f"step{number}.loss_weights"].tolist()
        compared += 1
    assert compared == recorded["micro_steps"]
