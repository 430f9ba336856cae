"""Every recorded file of the original is read by a test, or belongs to an area that is still to come.

`tests/spec/golden_files.json` lists all recorded files; the list of areas to come shrinks to nothing.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
FILES: list[str] = json.loads((TESTS / "spec" / "golden_files.json").read_text(encoding="utf-8"))

DATA_TOOLS = ("blip", "captioners", "git", "wd14")
# Pattern of file names -> the area that will read them.
LATER = {
    "controls_*": "ControlNet and LLLite",
    "models_keys_controlnet_sd15.json.gz": "ControlNet and LLLite",
    "networks_lora_lllite.safetensors": "ControlNet and LLLite",
    "networks_lora_hypernetwork.safetensors": "picture passes besides text to image",
    "tools_upscaler*": "picture passes besides text to image",
    **dict.fromkeys((f"tools_{name}*" for name in DATA_TOOLS), "data tools"),
}


def area_of(name: str) -> str | None:
    return next((area for pattern, area in LATER.items() if fnmatchcase(name, pattern)), None)


def is_list_of_later_things(node: ast.AST) -> bool:
    """`LATER... = {...}` in a test says what it does not read."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, (ast.Dict, ast.Set, ast.List)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id.startswith("LATER") for target in targets)


def texts_of(tree: ast.AST, gap: str) -> Iterator[str]:
    """Regular expressions for the texts of a test; `gap` is what stands in the gaps of f-strings."""
    for node in ast.iter_child_nodes(tree):
        if is_list_of_later_things(node):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else gap for p in node.values)
        else:
            yield from texts_of(node, gap)


@cache
def mentions(gap: str) -> list[re.Pattern[str]]:
    """The texts of all tests that can be the name of a recorded file, or its stem."""
    areas = {name.partition("_")[0] + "_" for name in FILES}
    found = set()
    for path in sorted(TESTS.rglob("*.py")):
        if path != Path(__file__):
            found |= set(texts_of(ast.parse(path.read_text(encoding="utf-8")), gap))
    return [re.compile(text) for text in found if text.startswith(tuple(areas))]


def is_read(name: str, gap: str = r"[\w-]+") -> bool:
    """Whether a test names the file, or a recorded JSON file that a test names does.

    With a narrow gap, names put together from several words do not count.
    """
    return is_named(name, gap) or any(
        name.partition(".")[0] in names_in(other) for other in FILES if is_named(other, gap)
    )


def is_named(name: str, gap: str) -> bool:
    stem = name.partition(".")[0]
    return any(pattern.fullmatch(name) or pattern.fullmatch(stem) for pattern in mentions(gap))


@cache
def names_in(name: str) -> frozenset[str]:
    """Stems of recorded files in a recorded JSON file."""
    path = GOLDEN / name
    text = path.read_text(encoding="utf-8") if path.suffix == ".json" and path.is_file() else ""
    return frozenset(re.findall(r"\w+", text)) & {other.partition(".")[0] for other in FILES}


def test_nothing_is_recorded_that_the_list_does_not_know() -> None:
    assert {path.name for path in GOLDEN.iterdir()} <= set(FILES)
    assert len(FILES) == len(set(FILES)) > 170


@pytest.mark.parametrize("name", FILES)
def test_file(name: str) -> None:
    area = area_of(name)
    if area is None:
        assert (GOLDEN / name).is_file(), "missing, and of no area to come"
        assert is_read(name), "no test reads it"
    else:
        assert not ((GOLDEN / name).is_file() and is_read(name, "[^_]+")), (
            f"it is read now: take it out of the area {area!r}"
        )


def test_every_pattern_has_files() -> None:
    assert [pattern for pattern in LATER if not any(fnmatchcase(name, pattern) for name in FILES)] == []


def test_a_name_in_a_list_of_later_things_does_not_count() -> None:
    source = 'LATER_FILES = {"a_b.json": 1}\nread(f"x_{name}.json")\nread("y_z")'
    assert sorted(texts_of(ast.parse(source), r"\w+")) == [r"x_\w+\.json", "y_z"]
