"""What a bad data-set file is told: the place, what was found, what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.config import Support, resolve_datasets
from library.data.config_file import read
from library.data.support import with_masks
from library.messages import UserError
from library.options.dataset import DatasetConfig


def refused(path: Path, support: Support | None = None) -> str:
    with pytest.raises(UserError) as error:
        resolve_datasets(DatasetConfig(dataset_config=path), support=support or Support())
    return str(error.value)


def write(tmp_path: Path, text: str, name: str = "data.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_all_problems_come_together_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """# comment
[general]
train_batch_size = 2
is_reg = true

[[datasets]]
resolution = "512"
[[datasets.subsets]]
image_dir = "a"
flipaug = true
[[datasets]]
  [[datasets.subsets]]
  num_repeats = 1.5
  metadata_file = "x"
""",
    )
    assert refused(path).split("\n") == [
        f"{path} has 7 problems",
        "  line 3: general.train_batch_size: is no key of a data-set file: the key is batch_size",
        "  line 4: general.is_reg: is not allowed in [general]: it belongs into a [[datasets.subsets]] table",
        '  line 7: datasets[0].resolution: found "512", must be a whole number or a list of two, [width, height]',
        "  line 10: datasets[0].subsets[0].flipaug: unknown key in [[datasets.subsets]], did you mean flip_aug?",
        "  line 13: datasets[1].subsets[0].num_repeats: found 1.5, must be a whole number",
        "  line 14: datasets[1].subsets[0].metadata_file: is not allowed in [[datasets.subsets]]: this script or this "
        "kind of data set does not use it",
        "  line 12: datasets[1].subsets[0].image_dir: missing, this subset needs it",
    ]


def test_one_problem_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nbatch_size = 2\n')
    assert refused(path) == (
        f"{path}: line 4: datasets[0].subsets[0].batch_size: is not allowed in [[datasets.subsets]]: "
        "put it into [[datasets]] or [general]"
    )


def test_wrong_header_brackets(tmp_path: Path) -> None:
    path = write(tmp_path, "[datasets]\nresolution = 512\n")
    assert "must be a list of tables; in TOML the header is [[datasets]]" in refused(path)
    path = write(tmp_path, '[[datasets]]\n[datasets.subsets]\nimage_dir = "a"\n')
    assert "the header is [[datasets.subsets]]" in refused(path)


def test_json_problems_have_paths(tmp_path: Path) -> None:
    path = write(tmp_path, '{"datasets": [{"subsets": [{"image_dir": null}]}]}', "data.JSON")
    assert refused(path) == f"{path}: datasets[0].subsets[0].image_dir: found null, must be a text in quotes"


@pytest.mark.parametrize(
    "text", ['pretrained_model_name_or_path = "m"\n', '[model]\noutput_dir = "o"\n[train]\nlearning_rate = 1e-4\n']
)
def test_a_training_file_is_recognised(text: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, text))
    assert "is a training configuration" in message
    assert "--config_file" in message


def test_windows_paths_get_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n')
    assert "write paths with / or in '...'" in refused(path)


@pytest.mark.parametrize(
    ("name", "words"), [("gone.toml", "does not exist"), ("folder.toml", "is a folder"), ("a.yaml", "ending .yaml")]
)
def test_files_that_are_no_data_set_files(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "a.yaml").write_text("a: 1")
    assert words in refused(tmp_path / name)


def test_utf8_with_a_mark_is_read_and_other_encodings_are_named(tmp_path: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "größe"\n'
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read(path)["datasets"][0]["subsets"][0]["image_dir"] == "größe"
    path.write_bytes(text.encode("latin-1"))
    assert "is not UTF-8" in refused(path)


def test_values_above_a_subset_reach_it_and_options_come_last(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
[general]
caption_separator = ";"
validation_split = 0.1
resize_interpolation = "lanczos"
custom_attributes = {a = 1}
[[datasets]]
network_multiplier = 2
keep_tokens_separator = "|||"
[[datasets.subsets]]
image_dir = "a"
alpha_mask = true
caption_separator = "."
[[datasets.subsets]]
image_dir = "b"
""",
    )
    options = DatasetConfig(dataset_config=path, caption_separator="!", secondary_separator="##", resolution="64,32")
    (found,) = resolve_datasets(options, support=Support())
    first, second = found.subsets
    assert (found.resolution, found.network_multiplier, found.validation_split) == ((64, 32), 2, 0.1)
    assert found.resize_interpolation == second.resize_interpolation == "lanczos"
    assert (first.caption_separator, second.caption_separator) == (".", ";")
    assert (first.alpha_mask, second.alpha_mask) == (True, False)
    assert first.keep_tokens_separator == "|||"
    assert first.secondary_separator == "##"
    assert first.custom_attributes == {"a": 1}


def test_what_folders_and_files_leave_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n')
    with caplog.at_level("WARNING", "toolkit"):
        resolve_datasets(DatasetConfig(dataset_config=path, train_data_dir="x"), support=Support())
    assert "not used because --dataset_config is given: --train_data_dir" in caplog.text
    with pytest.raises(UserError, match="no training pictures are given"):
        resolve_datasets(DatasetConfig(), support=Support())
    with pytest.raises(UserError, match="--in_json is missing"):
        resolve_datasets(DatasetConfig(), support=Support(dreambooth=False, finetuning=True))


def test_masks_from_a_folder_need_masked_loss(tmp_path: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "m"\n'
    path = write(tmp_path, text)
    assert "it gives masks of the loss, which need --masked_loss" in refused(path)
    found = resolve_datasets(DatasetConfig(dataset_config=path), support=with_masks(Support(), True))
    assert found[0].kind == "dreambooth" and found[0].subsets[0].conditioning_data_dir == "m"
    pairs = Support(dreambooth=False, controlnet=True)
    assert with_masks(pairs, True) == pairs
    (found,) = resolve_datasets(DatasetConfig(dataset_config=path), support=pairs)
    assert found.kind == "controlnet"


def test_a_data_set_for_validation_says_so_itself(tmp_path: Path) -> None:
    text = '[[datasets]]\nis_validation = true\n[[datasets.subsets]]\nimage_dir = "a"\n[[datasets]]\n'
    found = resolve_datasets(DatasetConfig(dataset_config=write(tmp_path, text)), support=Support())
    assert [one.is_validation for one in found] == [True, False]
    path = write(tmp_path, "[general]\nis_validation = true\n[[datasets]]\n")
    assert "general.is_validation: is not allowed in [general]: put it into a [[datasets]] table" in refused(path)
    path = write(tmp_path, "[[datasets]]\nis_validation = 1\n")
    assert "must be true or false" in refused(path)


@pytest.mark.parametrize(("text", "size"), [("768", (768, 768)), ("[640, 480]", (640, 480))])
def test_small_pictures_are_skipped_from_either_place(text: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path, f"[[datasets]]\nskip_image_resolution = {text}\n[[datasets]]\n")
    options = DatasetConfig(dataset_config=path, skip_image_resolution="100,50")
    found = resolve_datasets(options, support=Support())
    assert [one.skip_image_resolution for one in found] == [size, (100, 50)]
    with pytest.raises(UserError, match="--skip_image_resolution x"):
        resolve_datasets(DatasetConfig(dataset_config=path, skip_image_resolution="x"), support=Support())


def test_masks_beside_the_options_folders(tmp_path: Path) -> None:
    for name in ("train/2_cat", "train/3_dog", "masks/2_cat"):
        (tmp_path / name).mkdir(parents=True)
    options = DatasetConfig(
        train_data_dir=str(tmp_path / "train"), conditioning_data_dir=str(tmp_path / "masks"), dataset_repeats=5
    )
    (found,) = resolve_datasets(options, support=with_masks(Support(finetuning=True), True))
    assert [subset.conditioning_data_dir for subset in found.subsets] == [
        str(tmp_path / "masks" / "2_cat"),
        str(tmp_path / "masks"),
    ]
    assert [subset.num_repeats for subset in found.subsets] == [2, 3]
    (found,) = resolve_datasets(options, support=Support())
    assert {subset.conditioning_data_dir for subset in found.subsets} == {None}
    options = DatasetConfig(in_json="m.json", conditioning_data_dir="masks", dataset_repeats=5)
    (found,) = resolve_datasets(options, support=with_masks(Support(finetuning=True), True))
    (subset,) = found.subsets
    assert (found.kind, subset.num_repeats, subset.conditioning_data_dir) == ("finetuning", 5, "masks")
    options = DatasetConfig(in_json="m.json", conditioning_data_dir=str(tmp_path / "masks"))
    (found,) = resolve_datasets(options, support=with_masks(Support(finetuning=True), True))
    assert found.subsets[0].conditioning_data_dir == str(tmp_path / "masks")
