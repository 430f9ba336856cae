"""The house keeps its rules: who imports whom, no cycle, no print, no relative import. Drawn from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules at the top of `library/` that are no porches; every room may import them.
FOUNDATION = {"charts", "messages", "page", "porch", "replaceable"}
# Room -> rooms that it may import, besides itself and the foundation.
MAY_IMPORT = {
    "options": set(),
    "runtime": {"options"},
    "diffusion": {"runtime", "options"},
    "models": {"diffusion", "runtime", "options"},
    "data": {"runtime", "options"},
    "prompts": set(),
    "generation": {"prompts", "models", "diffusion", "runtime", "options"},
    "training": {"generation", "prompts", "data", "models", "diffusion", "runtime", "options"},
    "networks": {"models", "runtime", "options"},
}


def sources() -> list[Path]:
    return sorted(p for folder in ("library", "networks") for p in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of a module, "foundation", or None for a porch."""
    parts = module.split(".")
    if parts[0] == "networks":
        return "networks"
    if len(parts) == 1 or parts[1] in FOUNDATION:
        return "foundation"
    return parts[1] if parts[1] in MAY_IMPORT else None


MODULES = {module_of(path): path for path in sources()}
PORCHES = {m for m in MODULES if m.count(".") == 1 and room_of(m) is None}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run (not those for type hints); with `lazy` also those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif is_type_checking(node):
            continue
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_of(node, lazy=lazy)


def targets_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules of this project that an import names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES else node.module or "" for name in names]
    return [name for name in names if name.split(".")[0] in ("library", "networks") and name in MODULES]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def edges(*, lazy: bool) -> dict[str, set[str]]:
    return {
        module: {t for node in imports_of(tree_of(module), lazy=lazy) for t in targets_of(node)} - {module}
        for module in MODULES
    }


def test_every_folder_is_a_room() -> None:
    folders = {p.name for p in (ROOT / "library").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(MAY_IMPORT)
    assert len(MODULES) > 50


def test_rooms_import_what_they_may() -> None:
    wrong = []
    for module, targets in edges(lazy=True).items():
        room = room_of(module)
        if room is None:
            continue
        allowed = MAY_IMPORT.get(room, set()) | {room, "foundation"}
        wrong += [f"{module} -> {target}" for target in sorted(targets) if room_of(target) not in {*allowed, None}]
    assert not wrong


def test_nobody_inside_imports_a_porch() -> None:
    found = [
        f"{module} -> {target}"
        for module, targets in edges(lazy=True).items()
        if module not in PORCHES
        for target in sorted(targets & PORCHES)
    ]
    assert not found


def test_import_linter_knows_every_porch() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = text[text.index('name = "nobody inside imports a porch"') :].partition("[[")[0]
    listed = set(re.findall(r'"(library\.\w+)"', contract.partition("forbidden_modules")[2]))
    assert listed == PORCHES


def test_library_does_not_name_networks() -> None:
    drawn = edges(lazy=True)
    found = [f"{m} -> {t}" for m in drawn if m.startswith("library") for t in drawn[m] if t.split(".")[0] == "networks"]
    assert not found


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle, or nothing."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> list[str]:
        state[module] = 1
        path.append(module)
        for target in sorted(graph.get(module, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (found := visit(target)):
                return found
        path.pop()
        state[module] = 2
        return []

    for module in sorted(graph):
        if module not in state and (found := visit(module)):
            return found
    return []


def test_no_cycle() -> None:
    assert not cycle_in(edges(lazy=False))


def test_a_cycle_would_be_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_rooms_have_no_cycle_even_lazily() -> None:
    rooms: dict[str, set[str]] = {}
    for module, targets in edges(lazy=True).items():
        if (room := room_of(module)) is not None:
            others = {room_of(t) for t in targets} - {room, None, "foundation"}
            rooms.setdefault(room, set()).update(r for r in others if r)
    assert not cycle_in(rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_print_and_no_relative_import(module: str) -> None:
    found = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"print in line {node.lineno}")
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"relative import in line {node.lineno}")
    assert not found or module == "library.messages"


def light_rooms() -> list[str]:
    return [m for m in MODULES if room_of(m) in ("foundation", "options", "prompts")]


def test_light_rooms_import_no_torch() -> None:
    found = []
    for module in light_rooms():
        for node in imports_of(tree_of(module), lazy=True):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{module} imports {name}" for name in names if name.split(".")[0] in ("torch", "diffusers")]
    assert not found
