"""The printed report of data sets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from library.data.group import build_group
from library.data.records import DatasetSettings, SubsetSettings
from library.data.report import describe
from library.data.sources import scan


def test_report_has_settings_counts_repeats_and_buckets(tmp_path: Path) -> None:
    for name, size in (("d/a", (64, 64)), ("d/b", (128, 64)), ("r/c", (64, 64)), ("gone/x", (8, 8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", size).save(tmp_path / f"{name}.png")
    settings = DatasetSettings(
        resolution=(64, 64),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=8,
        prior_loss_weight=0.5,
        subsets=(
            SubsetSettings(image_dir=str(tmp_path / "d"), num_repeats=3, shuffle_caption=True, class_tokens="sks dog"),
            SubsetSettings(image_dir=str(tmp_path / "r"), is_reg=True, keep_tokens=2),
            SubsetSettings(image_dir=str(tmp_path / "gone"), num_repeats=0),
        ),
    )
    group = build_group([settings], [scan(settings)], tokenize=None, seed=0)
    assert describe(group.datasets) == [
        "data set 1: dreambooth, resolution 64x64, batch size 2, buckets with sides from 32 to 128 in steps of 8",
        f'  {tmp_path / "d"}: 2 pictures x 3 repeats, class_tokens "sks dog", shuffle_caption',
        f"  {tmp_path / 'r'}: 1 pictures x 1 repeats, regularisation, keep_tokens 2",
        f"  {tmp_path / 'gone'}: left out",
        "  6 training pictures per epoch, repeats counted, and as many regularisation pictures (6 uses of 1 pictures, "
        "loss weight 0.5), which doubles the steps; 7 batches on one process",
        "  bucket 0: 64x64, 9 uses of 2 pictures, 5 batches",
        "  bucket 1: 88x40, 3 uses of 1 pictures, 2 batches",
        "  mean difference of aspect ratio between picture and bucket: 0.0667",
    ]


def test_a_metadata_file_is_named_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"a": {}}')
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    subset = SubsetSettings(image_dir=str(tmp_path), metadata_file=str(tmp_path / "m.json"))
    tuning = DatasetSettings(kind="finetuning", resolution=(64, 64), subsets=(subset,))
    group = build_group([tuning], [scan(tuning)], tokenize=None, seed=0)
    assert f"  {tmp_path / 'm.json'} with pictures in {tmp_path}: 1 pictures x 1 repeats" in describe(group.datasets)


def test_a_data_set_without_buckets_has_no_table(tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    settings = DatasetSettings(resolution=(64, 64), subsets=(SubsetSettings(image_dir=str(tmp_path)),))
    group = build_group([settings], [scan(settings)], tokenize=None, seed=0)
    assert describe(group.datasets) == [
        "data set 1: dreambooth, resolution 64x64, batch size 1, no buckets",
        f"  {tmp_path}: 1 pictures x 1 repeats",
        "  1 training pictures per epoch, repeats counted; 1 batches on one process",
    ]


def test_a_foreign_data_set_gets_one_line() -> None:
    class Foreign:
        def __len__(self) -> int:
            return 7

    assert describe([Foreign()]) == ["data set 1: Foreign, 7 batches"]
