"""The generated page is the one that the options give now."""

from __future__ import annotations

from pathlib import Path

from library.options.docs import page
from library.options.scripts import SCRIPTS

PAGE = Path(__file__).parent.parent.parent / "docs" / "options.md"


def test_page_is_fresh() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.rstrip("\n") == page(), "run: python -m library.options.docs > docs/options.md"


def test_page_has_every_option() -> None:
    text = page()
    for script in SCRIPTS.values():
        missing = [option.flag for option in script.options() if f"`{option.flag}`" not in text]
        assert not missing
