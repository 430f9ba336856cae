"""Old module names that third parties import: each is a table `old name -> room:name`, resolved on first use.

A porch module consists of a docstring, its table and two lines:

    NAMES = {"model_hash": "library.models.hashes:model_hash", ...}
    __getattr__, __dir__ = porch(__name__, NAMES)

`"library.models.hashes:"` (nothing after the colon) hands on the module itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def porch(module: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module `__getattr__` and `__dir__` that resolve the table's names lazily."""

    def resolve(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        room, _, attribute = names[name].partition(":")
        target = importlib.import_module(room)
        return getattr(target, attribute) if attribute else target

    return resolve, lambda: sorted(names)
