"""The data-set report: every planted fault is named, nothing else is, and its steps are those of the plan."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from library.data.inspection_page import make_page, spread
from library.data.inspection_text import lines_of
from library.data.plan import batches_per_epoch
from library.data.support import SUPPORT
from library.messages import UserError
from library.options.parser import parse, resolve
from library.options.scripts import SCRIPTS
from library.training.data_inspection import inspect_options, training_options
from library.training.data_metadata import manifest_metadata
from library.training.data_setup import build_data
from tests.test_page import Reader
from tools.inspect_dataset import inspect

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "tools/inspect_dataset.py"
SHAPES = ((128, 128), (192, 96), (96, 192))


def drawing(seed: int, size: tuple[int, int]) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), rng.randrange(8, 40)
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(rng.choices(range(256), k=3)))
    return image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve good pictures, a regularisation folder, one with masks, and one of each fault."""
    cats, reg, cut = (tmp_path / name for name in ("cats", "reg", "cut"))
    for folder in (cats, reg, cut):
        folder.mkdir()
    for i in range(12):
        drawing(i, SHAPES[i % 3]).save(cats / f"{i:02d}.png")
        (cats / f"{i:02d}.txt").write_text(f"cat, tag{i % 2}", encoding="utf-8")
    for i in range(3):
        drawing(100 + i, (128, 128)).save(reg / f"r{i}.png")
    masked = drawing(200, (128, 128)).convert("RGBA")
    masked.putalpha(Image.new("L", masked.size, 0))
    masked.save(cut / "masked.png")
    (cut / "masked.txt").write_text("masked", encoding="utf-8")
    (tmp_path / "data.toml").write_text(
        f"""
[general]
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
resolution = 128
batch_size = 3
min_bucket_reso = 64
bucket_reso_steps = 32
max_bucket_reso = 256
  [[datasets.subsets]]
  image_dir = '{cats}'
  num_repeats = 2
  flip_aug = true
  [[datasets.subsets]]
  image_dir = '{reg}'
  is_reg = true
  class_tokens = "animal"
[[datasets]]
resolution = 128
min_bucket_reso = 64
bucket_reso_steps = 32
max_bucket_reso = 256
  [[datasets.subsets]]
  image_dir = '{cut}'
  alpha_mask = true
""",
        encoding="utf-8",
    )
    return tmp_path


def report(data: Path, *arguments: str, processes: int = 1, read_pictures: bool = True):
    args = parse(SCRIPT, ["--dataset_config", str(data / "data.toml"), *arguments])
    options = training_options(args, args.script, SCRIPT)
    return inspect_options(options, processes=processes, read_pictures=read_pictures)


def texts(facts: dict) -> set[str]:
    return {problem["text"].partition(":")[0] for problem in facts["problems"]}


def test_a_good_data_set_has_no_problems(data):
    facts, _ = report(data)
    assert facts["problems"] == [
        {"level": "info", "text": "pictures with the class tokens as caption: 3 (no caption files there)"}
    ]
    assert [Path(path).name for path in facts["captions"]["by_class_tokens"]] == ["r0.png", "r1.png", "r2.png"]
    first = facts["datasets"][0]
    assert [(s["pictures_used"], s["uses"]) for s in first["subsets"]] == [(12, 24), (3, 24)]
    assert first["subsets"][1]["repeats_used"] == [8, 8]
    assert first["regularisation"] == {
        "pictures_found": 3, "pictures_used": 3, "uses_found": 3, "uses": 24, "loss_weight": 1.0
    }  # fmt: skip
    assert facts["captions"]["tags"] == {"cat": 12, "tag0": 6, "tag1": 6, "animal": 3, "masked": 1}
    assert facts["captions"]["tokens"]["lengths"] == {"1": 4, "4": 12}
    assert first["masks"] is None
    assert facts["datasets"][1]["masks"] == {"pictures": 1, "from_folder": 0, "alpha_asked": 1, "alpha_found": 1}
    assert facts["pictures"] == 16 and facts["uses"] == 49


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_steps_are_those_of_the_plan(data, processes):
    facts, group = report(data, "--gradient_accumulation_steps", "2", "--max_train_epochs", "5", processes=processes)
    batches = len(group.plan(0, 1, processes))
    steps = facts["steps"]
    assert steps["batches_per_epoch"] == batches == batches_per_epoch(group.datasets, processes)
    assert steps["steps_per_epoch"] == -(-batches // 2) and steps["steps"] == 5 * steps["steps_per_epoch"]
    assert sum(bucket["batches"] for one in facts["datasets"] for bucket in one["buckets"]) == batches
    sizes = [
        sum(len(rank[position].items) for rank in group.plan(0, 1, processes).batches) for position in range(batches)
    ]
    seen = sum(bucket["uses"] + bucket["uses_added"] for one in facts["datasets"] for bucket in one["buckets"])
    assert sum(sizes) == seen
    assert any("rounded up" in line for line in steps["equation"])


def plant(data: Path) -> dict[str, str]:
    """One of each fault; returns its problem -> the file that it is about."""
    cats = data / "cats"
    (cats / "lost.txt").write_text("nobody", encoding="utf-8")
    (cats / "text.png").write_bytes(b"no picture")
    (cats / "text.txt").write_text("cat", encoding="utf-8")
    (cats / "short.png").write_bytes((cats / "00.png").read_bytes()[:200])
    (cats / "short.txt").write_text("cat", encoding="utf-8")
    (cats / "stub.png").write_bytes((cats / "short.png").read_bytes())
    (cats / "stub.txt").write_text("cat", encoding="utf-8")
    (cats / "copy.png").write_bytes((cats / "01.png").read_bytes())
    (cats / "copy.txt").write_text("cat", encoding="utf-8")
    drawing(2, (96, 192)).save(cats / "again.jpg", quality=80)
    (cats / "again.txt").write_text(" ,", encoding="utf-8")
    drawing(50, (40, 40)).save(cats / "tiny.png")
    (cats / "tiny.txt").write_text("cat " * 80, encoding="utf-8")
    (cats / "blank.txt").write_text("\n", encoding="utf-8")
    drawing(51, (128, 128)).save(cats / "blank.png")
    drawing(52, (128, 128)).save(cats / "bare.png")
    drawing(53, (512, 64)).save(cats / "slim.png")
    (cats / "slim.txt").write_text("cat", encoding="utf-8")
    return {
        "files that cannot be read": "text.png short.png stub.png",
        "caption files without a picture": "lost.txt",
        "the same file more than once": "01.png copy.png",
        "pictures that look the same": "02.png again.jpg",
        "pictures enlarged more than 2 times": "tiny.png",
        "captions longer than 75 tokens": "tiny.png",
        "pictures with an empty caption": "blank.png",
        "pictures without a caption file": "bare.png",
        "pictures that lose more than 25% to the crop": "slim.png",
    }


def test_every_planted_fault_is_named(data):
    planted = plant(data)
    facts, _ = report(data)
    assert texts(facts) == {*planted, "pictures with the class tokens as caption"}
    files, captions = facts["files"], facts["captions"]
    found = {
        "files that cannot be read": {Path(text.split(" (")[0]).name for text in files["unreadable"]},
        "caption files without a picture": {Path(path).name for path in captions["orphans"]},
        "the same file more than once": {Path(path).name for group in files["duplicates"] for path in group},
        "pictures that look the same": {Path(path).name for group in files["similar"] for path in group},
        "pictures enlarged more than 2 times": {
            Path(entry["path"]).name for entry in facts["datasets"][0]["enlarged"] if entry["factor"] > 2
        },
        "captions longer than 75 tokens": {
            Path(entry["path"]).name for entry in captions["tokens"]["longest"] if entry["cut"]
        },
        "pictures with an empty caption": {Path(path).name for path in captions["empty"]} - {"bare.png"},
        "pictures without a caption file": {Path(path).name for path in captions["missing"]},
        "pictures that lose more than 25% to the crop": {
            Path(entry["path"]).name for entry in facts["datasets"][0]["cropped"]
        },
    }
    assert found == {problem: set(names.split()) for problem, names in planted.items()}
    quick, _ = report(data, read_pictures=False)
    assert quick["files"]["duplicates"] is None
    assert texts(quick) == texts(facts) - {"the same file more than once", "pictures that look the same"}
    assert len(quick["files"]["unreadable"]) == 1, "only what its first bytes tell"


def test_page_and_lines_tell_the_same(data):
    plant(data)
    facts, group = report(data, processes=2)
    assert json.loads(json.dumps(facts))["problems"] == facts["problems"]
    lines = "\n".join(lines_of(facts))
    reader = Reader(make_page(facts, group, pictures_per_bucket=2).html())
    for problem in facts["problems"]:
        assert problem["text"] in lines and problem["text"] in reader.text
    for line in facts["steps"]["equation"]:
        assert line in lines and line in reader.text
    assert facts["manifest_hash"] in lines and facts["manifest_hash"] in reader.text
    headings = ["Data sets", "Steps per epoch", "Buckets", "What the model sees", "Captions", "Pictures"]
    anchors = [attributes["id"] for attributes in reader.all("h2")]
    assert anchors == [*(text.lower().replace(" ", "-") for text in headings), "caches-on-disk", "manifest"]
    buckets = sum(len(dataset.buckets.sizes) for dataset in group.datasets)
    assert buckets < len(reader.all("img")) <= 2 * buckets + 4
    assert "masked.png (masked)" in reader.text and "(mirrored" in reader.text
    assert "half of the time mirrored" in reader.text


def test_kinds_and_held_out_pictures(data):
    """A metadata file whose pictures are partly held out, and masks from a folder."""
    masks, many = data / "masks", data / "many"
    for folder in (masks, many):
        folder.mkdir()
    for i in range(12):
        Image.new("L", SHAPES[i % 3], 255).save(masks / f"{i:02d}.png")
    entries = {}
    for i in range(8):
        drawing(300 + i // 2, (128, 128)).save(many / f"{i}.png")  # each twice
        entries[str(i)] = {"caption": ["short", "a longer caption of more words"], "tags": "red"}
    (data / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    (data / "data.toml").write_text(
        f"""
[general]
resolution = 128
[[datasets]]
  [[datasets.subsets]]
  image_dir = '{data / "cats"}'
  conditioning_data_dir = '{masks}'
  caption_extension = ".txt"
[[datasets]]
validation_split = 0.5
  [[datasets.subsets]]
  metadata_file = '{data / "meta.json"}'
  image_dir = '{many}'
  enable_wildcard = true
""".replace("resolution = 128", "resolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32"),
        encoding="utf-8",
    )
    facts, group = report(data, "--masked_loss")
    assert facts["datasets"][0]["masks"]["from_folder"] == 12 and facts["datasets"][1]["kind"] == "finetuning"
    assert facts["validation_pictures"] == 4 and facts["datasets"][1]["subsets"][0]["pictures_used"] == 4
    held_out = {item.path for item in group.validation.datasets[0].items}
    pairs = [group for group in facts["files"]["duplicates"] if len(held_out.intersection(group)) == 1]
    assert pairs and facts["files"]["leaks"] == pairs
    captions = {entry["caption"] for entry in facts["captions"]["tokens"]["longest"]}
    assert "a longer caption of more words,red" in captions and "short,red" not in captions
    html = make_page(facts, group, pictures_per_bucket=1).html()
    assert "one of several captions" in html and f"{12:,} from a folder" in html


def test_metadata_of_a_training_has_the_same_hash(data):
    facts, _ = report(data)
    given = ["--dataset_config", str(data / "data.toml"), "--debug_dataset"]
    options = resolve(parse("train_network.py", given), "train_network.py")
    group = build_data(options, SUPPORT["train_network.py"], [], 5)
    assert manifest_metadata(group.datasets) == {"ss_dataset_manifest_hash": facts["manifest_hash"]}


def test_pictures_of_a_wrong_size_without_buckets(data):
    text = (data / "data.toml").read_text(encoding="utf-8").replace("enable_bucket = true", "enable_bucket = false")
    (data / "data.toml").write_text(text, encoding="utf-8")
    facts, group = report(data)
    assert "pictures that do not have the training size" in texts(facts)
    assert len(facts["datasets"][0]["wrong_size"]) == 8
    html = make_page(facts, group, pictures_per_bucket=4).html()
    assert "without buckets every picture must be 128x128" in html
    cached, _ = report(data, "--cache_latents")
    assert "pictures that do not have the training size" not in texts(cached)


def test_options_of_other_scripts_and_of_none(data, caplog):
    args = parse(SCRIPT, ["--dataset_config", str(data / "data.toml"), "--network_dim", "4", "--block_lr", "1"])
    options = training_options(args, "train_network.py", SCRIPT)
    assert options.network.network_dim == 4 and not options.dataset.debug_dataset
    assert "block_lr" in caplog.text
    with pytest.raises(UserError, match="did you mean sdxl_train_network"):
        training_options(args, "sdxl_train_netwrk.py", SCRIPT)
    with pytest.raises(UserError, match="is no training script"):
        training_options(args, SCRIPT, SCRIPT)


def test_a_word_to_learn_is_written_out(data):
    def of_word(*more):
        args = parse(SCRIPT, ["--dataset_config", str(data / "data.toml"), "--token_string", "zqx", *more])
        options = training_options(args, "train_textual_inversion.py", SCRIPT)
        return inspect_options(options, read_pictures=False)

    facts, _ = of_word("--num_vectors_per_token", "3")
    assert facts["problems"][0]["text"].startswith("no caption holds the word zqx")
    facts, group = of_word("--num_vectors_per_token", "3", "--use_style_template")
    lengths = [entry["tokens"] for entry in facts["captions"]["tokens"]["longest"]]
    assert "zqx zqx1 zqx2" in make_page(facts, group, pictures_per_bucket=1).html() and max(lengths) < 13
    assert not any("zqx" in problem["text"] for problem in facts["problems"])
    plain = training_options(
        parse(SCRIPT, ["--dataset_config", str(data / "data.toml")]), "train_textual_inversion.py", SCRIPT
    )
    assert inspect_options(plain, read_pictures=False)[0]["captions"]["tokens"]["lengths"] == {"1": 4, "4": 12}


def test_every_training_script_can_be_reported():
    known = [script for script, entry in SCRIPTS.items() if "optimizer" in entry.concerns and script != SCRIPT]
    assert set(known) <= set(SUPPORT)


def test_spread_takes_the_first_and_equal_distances():
    assert spread(range(10), 3) == [0, 3, 6] and spread([5, 7], 3) == [5, 7] and spread([], 2) == []


def test_command_writes_json_and_the_page(data):
    command = [
        sys.executable,
        str(ROOT / SCRIPT),
        "--dataset_config",
        "data.toml",
        "--json",
        "--pictures_per_bucket",
        "1",
    ]
    result = subprocess.run(command, cwd=data, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["uses"] == 49
    assert facts["manifest_hash"] in (data / "dataset_report.html").read_text(encoding="utf-8")


def test_command_without_data_is_refused():
    with pytest.raises(UserError, match="no pictures given"):
        inspect(parse(SCRIPT, ["--page", ""]))
