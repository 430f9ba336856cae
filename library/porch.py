"""Old module names that third parties import: each is a table `old name -> room:name`, resolved on first use.

A porch module consists of a docstring, its table and two lines:

    NAMES = {"model_hash": "library.models.hashes:model_hash", ...}
    __getattr__, __dir__ = porch(__name__, NAMES)

`"library.models.hashes:"` (nothing after the colon) hands on the module itself. An assignment to a porch reaches the
rooms for the names of `library.replaceable`; any other is kept, with a warning.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from library.messages import warn_once
from library.replaceable import replace


class Porch(ModuleType):
    """A module whose names may be assigned from outside."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name.startswith("__"):
            return
        module = self.__name__.rpartition(".")[2]
        if not replace(module, name, None if value is _own(self, name) else value):
            warn_once(f"{self.__name__}.{name} was assigned from outside; this program does not call it from there")

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        replace(self.__name__.rpartition(".")[2], name, None)


def porch(module: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module `__getattr__` and `__dir__` that resolve the table's names lazily."""

    def resolve(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        room, _, attribute = names[name].partition(":")
        target = importlib.import_module(room)
        return getattr(target, attribute) if attribute else target

    if module != "__main__":
        sys.modules[module].__class__ = Porch
    return resolve, lambda: sorted(names)


def _own(module: ModuleType, name: str) -> Any:
    """What the module's table has under a name, or None."""
    names = vars(module).get("NAMES", {})
    return vars(module)["__getattr__"](name) if name in names else None
