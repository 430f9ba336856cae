"""Data-set files and options against the recorded cases of sd-scripts 0.7.0, and what bad input is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from library.data import config, sources
from library.data.buckets import bucket_rule
from library.data.support import SUPPORT
from library.messages import UserError
from library.options.dataset import DatasetConfig
from library.options.declare import from_namespace, options_of
from library.options.model import ModelConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "datasets_config.json").read_text(encoding="utf-8"))

# The original accepts these and ends with "no data found" or fails later; here they are refused at once.
REFUSED_NOW = {
    "train_network|--train_data_dir missing_dir": "does not exist",
    "sdxl_train|--train_data_dir missing_dir": "does not exist",
    "train_textual_inversion|--train_data_dir missing_dir": "does not exist",
    "train_controlnet|--conditioning_data_dir cond": "--train_data_dir is missing",
}
# Keys that the original did not know and that are part of this program.
KNOWN_NOW = {"option only known later: enable_wildcard", "option only known later: keep_tokens_separator"}
# A metadata file of options may go without --train_data_dir (the original refused it).
ACCEPTED_NOW = {"image_dir null with in_json from arguments"}


# What is said of metadata files and pairs of pictures that do not fit.
WORDS = {
    "metadata file does not exist": "nofile.json does not exist",
    "resolution missing, no bucket info in metadata": "no training resolution",
    "bucket_no_upscale with bucket info in metadata": "bucket_no_upscale",
    "image of metadata not found": "zzz (named in md_miss.json, not found in imgs)",
    "conditioning image missing": "no picture of the same name in cond_missing (imgs/b.png)",
    "conditioning image without image": "no training picture (cond_extra/z.png)",
}


def case_name(case: dict) -> str:
    text = case["config"]
    if text is None:
        return f"{case['script']}|{' '.join(case['argv'])}"
    return f"{case['script']}|{' '.join([*case['argv'], case['config_format']])}|{text}"


def parse(case: dict) -> tuple[DatasetConfig, int | None, config.Support]:
    flags = GOLDEN["scripts"][case["script"]]
    offered = flags["dataset_options"]
    parser = argparse.ArgumentParser()
    for option in options_of(DatasetConfig):
        if option.dest.startswith("caption_") and "dropout" in option.dest and not offered["caption_dropout"]:
            continue
        if option.dest == "prior_loss_weight" and not flags["prior_loss_weight_option"]:
            continue
        option.add_to(parser)
    next(o for o in options_of(ModelConfig) if o.dest == "max_token_length").add_to(parser)
    namespace = parser.parse_args(case["argv"])
    if case["config"] is not None:
        path = Path(f"config.{case['config_format']}")
        path.write_text(case["config"], encoding="utf-8")
        namespace.dataset_config = path
    return (
        from_namespace(DatasetConfig, namespace),
        namespace.max_token_length,
        config.Support(**flags["config_support"]),
    )


def resolve(case: dict) -> tuple[config.DatasetSettings, ...]:
    dataset, max_token_length, support = parse(case)
    return config.resolve_datasets(dataset, support=support, max_token_length=max_token_length)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("layout")
    layout = GOLDEN["folder_layout"]
    places = [root / name for name in ("imgs", "imgs2", "cond", "txt")]
    for top in ("train", "reg"):
        places += [root / top / name for name in layout[top] if not name.endswith(".txt")]
    for place in places:
        place.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (64, 64)).save(place / name)
    (root / "train" / "file.txt").write_text("x")
    (root / "md.json").write_text(json.dumps(layout["md.json"]))
    for name, entries in {
        "md_res.json": {"a": {"train_resolution": [64, 64]}},
        "md_miss.json": {"zzz": {"caption": "x"}},
    }.items():
        (root / name).write_text(json.dumps(entries))
    for name, pictures in {"cond_missing": ("a.png",), "cond_extra": ("a.png", "b.png", "z.png")}.items():
        (root / name).mkdir()
        for picture in pictures:
            Image.new("RGB", (64, 64)).save(root / name / picture)
    return root


@pytest.fixture
def inside(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folders)
    return folders


def expected_kind(dataset: dict, case: dict) -> str:
    # The original takes a data set without subsets for ControlNet; here it is of the script's own kind.
    if dataset["subsets"]:
        return dataset["kind"]
    support = GOLDEN["scripts"][case["script"]]["config_support"]
    return next(kind for kind in ("dreambooth", "finetuning", "controlnet") if support[kind])


def differences(dataset: dict, found: config.DatasetSettings, case: dict) -> list[str]:
    wanted = [("kind", expected_kind(dataset, case), found.kind)]
    wanted += [(key, value, getattr(found, key)) for key, value in dataset["params"].items()]
    if len(dataset["subsets"]) != len(found.subsets):
        return [f"{len(found.subsets)} subsets instead of {len(dataset['subsets'])}"]
    for index, (subset, settings) in enumerate(zip(dataset["subsets"], found.subsets, strict=True)):
        wanted += [(f"subsets[{index}].{key}", value, getattr(settings, key)) for key, value in subset.items()]
    plain = [(key, tuple(value) if isinstance(value, list) else value, other) for key, value, other in wanted]
    return [f"{key}: {other!r} instead of {value!r}" for key, value, other in plain if value != other]


@pytest.mark.parametrize("case", GOLDEN["accepted"], ids=case_name)
def test_accepted_cases_resolve_to_the_recorded_settings(case: dict, inside: Path) -> None:
    if not case["datasets"] or case_name(case) in REFUSED_NOW:
        words = REFUSED_NOW.get(case_name(case), "no datasets")
        with pytest.raises(UserError, match=words):
            resolve(case)
        return
    found = resolve(case)
    assert len(found) == len(case["datasets"])
    for dataset, settings in zip(case["datasets"], found, strict=True):
        assert differences(dataset, settings, case) == []


def build(case: dict) -> None:
    """What happens to the settings next: buckets are made and folders scanned."""
    for settings in resolve(case):
        scanned = sources.scan(settings)
        assert scanned.items
        bucket_rule(
            settings.resolution,
            enable=settings.enable_bucket,
            smallest=settings.min_bucket_reso,
            largest=settings.max_bucket_reso,
            step=settings.bucket_reso_steps,
        )


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN["refused"] if case["reason"] not in KNOWN_NOW | ACCEPTED_NOW],
    ids=lambda case: f"{case['reason']}|{case_name(case)}",
)
def test_refused_cases_are_refused_naming_the_recorded_place(
    case: dict, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = {"caption file empty": b"", "caption file not UTF-8": b"\xffabc\xc3"}
    if case["reason"] in captions:
        (inside / "txt" / "a.caption").write_bytes(captions[case["reason"]])
    if case["exception"] == "SystemExit":
        with pytest.raises(SystemExit):
            parse(case)
        return
    with pytest.raises(UserError) as error:
        build(case)
    assert WORDS.get(case["reason"], "") in str(error.value)
    if case["stage"] == "config" and case["config"] is not None:
        for detail in case["details"]:
            assert place_of(detail["path"]) in str(error.value)


def place_of(path: list[str]) -> str:
    return "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in path).lstrip(".")


def test_exceptions_from_the_recorded_cases_exist() -> None:
    reasons = {case["reason"] for case in GOLDEN["refused"]}
    assert reasons >= KNOWN_NOW | ACCEPTED_NOW | set(WORDS)
    names = {case_name(case) for case in GOLDEN["accepted"]}
    assert {name for name in REFUSED_NOW if "|config " not in name} <= names


@pytest.mark.parametrize("script", sorted(GOLDEN["scripts"]))
def test_each_script_takes_the_recorded_kinds_of_data_sets(script: str) -> None:
    assert SUPPORT[f"{script}.py"] == config.Support(**GOLDEN["scripts"][script]["config_support"])
    masked = {name for name, support in SUPPORT.items() if support.masks}
    assert masked == {"tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"}
    assert all(str(name).endswith(".py") and support.kinds for name, support in SUPPORT.items())


@pytest.mark.parametrize(
    "case", [c for c in GOLDEN["refused"] if c["reason"] in KNOWN_NOW | ACCEPTED_NOW], ids=case_name
)
def test_cases_that_are_accepted_now(case: dict, inside: Path) -> None:
    assert len(resolve(case)) == 1
