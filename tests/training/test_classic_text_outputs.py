"""The old functions of the text output cache give what the cache itself makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import library.train_util as old
from library.data.text_file import read_text
from library.models.family import family
from library.models.tokenizers import input_ids
from library.training.text_outputs import CaptionEncoder, TextCacher, origin_of

CAPTIONS = ["a red circle", "two blue squares on a table, " * 12]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path):
    return family("sdxl").load(tiny_sdxl)


@pytest.mark.parametrize("length", [None, 150])
@pytest.mark.parametrize("to_disk", [False, True])
def test_a_batch_of_pictures(model, tmp_path: Path, length: int | None, to_disk: bool) -> None:
    infos = [old.ImageInfo(f"{i}.png", 1, text, False, f"{i}.png") for i, text in enumerate(CAPTIONS)]
    for info in infos:
        info.text_encoder_outputs_npz = str(tmp_path / f"{info.image_key[0]}{old.TEXT_ENCODER_OUTPUTS_CACHE_SUFFIX}")
    ids = [input_ids(tokenizer, CAPTIONS, length) for tokenizer in model.tokenizers]
    old.cache_batch_text_encoder_outputs(
        infos, model.tokenizers, model.text_encoders, length, to_disk, *ids, torch.float32
    )
    encode = CaptionEncoder(family("sdxl"), model.tokenizers, model.text_encoders, length, "cpu", torch.float32)
    wanted = encode(CAPTIONS)
    for row, info in enumerate(infos):
        if to_disk:
            made = old.load_text_encoder_outputs_from_disk(info.text_encoder_outputs_npz)
            assert info.text_encoder_outputs1 is None
        else:
            made = (info.text_encoder_outputs1, info.text_encoder_outputs2, info.text_encoder_pool2)
        for ours, tensor in zip(made, wanted.row(row).tensors(), strict=True):
            torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-5)
        assert made[0].shape == ((length or 75) + 2, 64)


def test_files_are_written_and_read(tmp_path: Path) -> None:
    tensors = (torch.randn(77, 4, dtype=torch.float64), torch.randn(77, 6).half(), torch.randn(6))
    old.save_text_encoder_outputs_to_disk(str(tmp_path / "a.npz"), *tensors)
    read = old.load_text_encoder_outputs_from_disk(str(tmp_path / "a.npz"))
    assert all(torch.equal(ours, tensor.float()) for ours, tensor in zip(read, tensors, strict=True))


def test_what_the_files_depend_on(model) -> None:
    """Another weight, another tokenizer or another precision is another origin; the device is not."""

    def origin(tokenizers=model.tokenizers, dtype=torch.float32):
        return origin_of(tokenizers, model.text_encoders, None, dtype)

    first = origin()
    assert first == origin() and first.widths == (64, 64, 64) and first.length == 77
    assert origin(dtype=torch.bfloat16).dtype == "bfloat16"
    assert origin(tokenizers=model.tokenizers[::-1]).encoders != first.encoders
    parameter = next(model.text_encoders[1].parameters())
    with torch.no_grad():
        parameter += 1
        changed = origin()
        parameter -= 1
    assert changed.encoders != first.encoders


def test_data_sets_with_the_old_constructors(model, tmp_path: Path, reference: Path) -> None:
    """`DreamBoothDataset.cache_text_encoder_outputs` and the group's method give the same batches."""
    subset = old.DreamBoothSubset(
        str(reference / "data" / "train" / "1_shape"), False, "shape", ".txt", 1, False, 0, False, False, None, False,
        0.0, 0, 0.0, None, None, 1, 0,
    )  # fmt: skip
    dataset = old.DreamBoothDataset([subset], 2, model.tokenizers, None, (96, 96), True, 64, 256, 32)
    dataset.make_buckets()
    group = old.DatasetGroup([dataset])
    group.cache_text = TextCacher(family("sdxl"))
    group.cache_text_encoder_outputs(model.tokenizers, model.text_encoders, "cpu", torch.float32)
    batch = group[0]
    assert batch["input_ids"] is None
    encode = CaptionEncoder(family("sdxl"), model.tokenizers, model.text_encoders, None, "cpu", torch.float32)
    wanted = encode(batch["captions"])
    keys = ("text_encoder_outputs1_list", "text_encoder_outputs2_list", "text_encoder_pool2_list")
    for key, tensor in zip(keys, wanted.tensors(), strict=True):
        torch.testing.assert_close(batch[key], tensor, rtol=1e-5, atol=1e-5)


def test_reading_names_a_broken_file(tmp_path: Path) -> None:
    from library.messages import UserError

    path = tmp_path / f"a{old.TEXT_ENCODER_OUTPUTS_CACHE_SUFFIX}"
    path.write_bytes(b"PK half")
    with pytest.raises(UserError, match=r"a_te_outputs\.npz"):
        read_text(path)
