"""The documentation is true where a program can tell: options, keys, names, links, examples."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from library.data import config_schema
from library.data.records import DatasetSettings, SubsetSettings
from library.options.parser import build_parser
from library.options.registries import LOSSES, NETWORKS, OPTIMIZERS, SAMPLERS, SCHEDULES
from library.options.scripts import SCRIPTS
from library.prompts.line_options import PICTURE_ITEMS, SAMPLE_ITEMS, SIZE_CONDITION_ITEMS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

# Options of other programs that the pages name.
FOREIGN = {
    "accelerate launch": {"--multi_gpu", "--num_processes", "--quiet", "--machine_rank"},
    "torchrun": {"--nproc_per_node"},
    "pip": {"--index-url"},
}
FLAG = re.compile(r"(?<![\w-])--[A-Za-z]\w*(?:-\w+)*")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    return path.name


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text(encoding="utf-8")) if kind == language]


@cache
def known_flags() -> frozenset[str]:
    """Options of the scripts, of prompt lines, and of the small programs of the repository."""
    flags = {flag for script in SCRIPTS for action in build_parser(script)._actions for flag in action.option_strings}
    flags |= {f"--{item.name}" for item in (*PICTURE_ITEMS, *SAMPLE_ITEMS, *SIZE_CONDITION_ITEMS)}
    programs = [ROOT / "quickstart.py", *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    for program in programs:
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', program.read_text(encoding="utf-8")))
    return frozenset(flags.union(*FOREIGN.values()))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_option_that_is_named_exists(page: Path) -> None:
    named = set(FLAG.findall(page.read_text(encoding="utf-8")))
    assert not sorted(named - known_flags())


def test_foreign_options_are_needed_and_foreign() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    foreign = set().union(*FOREIGN.values())
    assert foreign <= set(FLAG.findall(text)), "listed and not named on any page"
    own = {flag for script in SCRIPTS for action in build_parser(script)._actions for flag in action.option_strings}
    assert not foreign & own, "an option of this project is listed as foreign"


def anchors(path: Path) -> set[str]:
    """Names of a page's headings as links write them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_examples_of_files_can_be_read(page: Path) -> None:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    for body in fences(page, "toml"):
        tomllib.loads(body)
    for body in fences(page, "json"):
        json.loads(body)


def test_training_examples_have_known_options() -> None:
    known = {action.dest for action in build_parser("train_network.py")._actions}
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    files = [tomllib.loads(body) for body in fences(ROOT / "docs" / "train_network.md", "toml")]
    training = [file for file in files if "network_module" in file]
    assert training
    assert not [key for file in training for key in file if key not in known]


def test_data_set_examples_are_accepted() -> None:
    page = ROOT / "docs" / "dataset_config.md"
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    files = [*map(tomllib.loads, fences(page, "toml")), *map(json.loads, fences(page, "json"))]
    support = config_schema.Support(dreambooth=True, finetuning=True)
    assert len(files) >= 3
    assert not [problem for file in files for problem in config_schema.check(file, support)]


def commands() -> list[tuple[str, str]]:
    """(script, command line) of the fenced commands that start one of the scripts."""
    found = []
    for page in PAGES:
        for body in fences(page, ""):
            for line in body.splitlines():
                for script in SCRIPTS:
                    if f" {script} " in line and line.startswith(("python ", "accelerate ")):
                        found.append((script, line.partition(f" {script} ")[2]))
    return found


@pytest.mark.parametrize(("script", "command"), commands())
def test_commands_can_be_parsed(script: str, command: str) -> None:
    build_parser(script).parse_args(shlex.split(command))


def test_there_are_commands() -> None:
    assert {script for script, _ in commands()} >= {"train_network.py", "gen_img_diffusers.py"}


def key_rows() -> dict[str, tuple[set[str], str]]:
    """Key -> (levels, default) of the table in the data-set page."""
    row = re.compile(r"^\| `(\w+)` \| ([gds ]+) \|[^|]*\|([^|]*)\|", re.MULTILINE)
    rows = row.findall(text_of("docs/dataset_config.md"))
    assert len(rows) == len({key for key, _, _ in rows}), "a key stands twice"
    return {key: (set(levels.split()), default.strip()) for key, levels, default in rows}


def expected_levels() -> dict[str, set[str]]:
    above = {"g", "d"}
    levels = {key: set(above) for key in config_schema.DATASET_KEYS}
    levels |= {key: {"d"} for key in config_schema.DATASET_ONLY_KEYS}
    shared = {**config_schema.SUBSET_KEYS, **config_schema.DROPOUT_KEYS}
    for kind in config_schema.SHARED_KEYS.values():
        shared |= kind
    levels |= {key: {*above, "s"} for key in shared}
    for kind in config_schema.OWN_KEYS.values():
        levels |= {key: {"s"} for key in kind}
    return levels


def test_data_set_page_has_every_key_at_its_levels() -> None:
    assert {key: levels for key, (levels, _) in key_rows().items()} == expected_levels()


def test_data_set_page_has_the_defaults() -> None:
    wrong = {}
    for key, (_, shown) in key_rows().items():
        settings = SubsetSettings() if hasattr(SubsetSettings(), key) else DatasetSettings()
        default = getattr(settings, key)
        text = "" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)
        if key == "resize_interpolation":
            text = "area"
        if shown.strip("`") != text:
            wrong[key] = (shown, text)
    assert not wrong


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/training.md", [name for r in OPTIMIZERS for name in (r.name, *r.aliases)]),
        ("docs/training.md", [record.name for record in SCHEDULES]),
        ("docs/training.md", [record.name for record in LOSSES]),
        ("docs/train_network.md", [a for r in NETWORKS if r.name == "networks.lora" for a in r.arguments]),
        ("docs/gen_img.md", [name for r in SAMPLERS for name in (r.name, *r.aliases)]),
        ("docs/gen_img.md", [f"--{item.name}" for item in PICTURE_ITEMS]),
        ("docs/training.md", [f"--{item.name}" for item in SAMPLE_ITEMS if item.name not in ("g", "cn")]),
    ],
)
def test_pages_name_every_choice(page: str, names: list[str]) -> None:
    text = text_of(page)
    assert names
    assert not [name for name in names if f"`{name}`" not in text]


@pytest.mark.parametrize("script", ["train_network.py", "gen_img_diffusers.py"])
def test_every_page_is_reachable_from_the_readme(script: str) -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(text_of("README.md"))}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked
    assert script in text_of("README.md")


def test_calls_of_samplers_are_those_of_the_registry() -> None:
    text = text_of("docs/gen_img.md")
    for record in SAMPLERS:
        aliases = "".join(f" (`{alias}`)" for alias in record.aliases)
        assert f"| `{record.name}`{aliases} | {record.calls} |" in text
