"""Reports in a real browser: nothing is fetched, nothing fails, nothing is cut off at the width of a telephone."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.inspection_page import make_page
from tests.browser import console_of, find_browser, measure
from tests.data.test_inspection import data, plant, report  # noqa: F401 - a fixture and its helpers
from tests.test_page import full_page

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium here: install it (Debian: apt-get install chromium) to test the pages"
)


@pytest.fixture
def pages(data: Path) -> list[Path]:  # noqa: F811
    plant(data)
    facts, group = report(data, processes=2)
    texts = {
        "data": make_page(facts, group, pictures_per_bucket=3).html(),
        "kit": full_page().html(),
    }
    for name, text in texts.items():
        (data / f"{name}.html").write_text(text, encoding="utf-8")
    return [data / f"{name}.html" for name in texts]


def test_reports_in_a_browser(pages: list[Path], tmp_path: Path) -> None:
    for page, dark in zip(pages, (False, True), strict=True):
        assert console_of(page, tmp_path) == [], f"{page.name}: an error, or a request that the policy refused"
        measured = measure(page, tmp_path, 400, 1400, dark=dark)
        assert set(measured) == {400, 1400}
        for width, found in measured.items():
            assert found["page"] <= width and not found["wide"], f"{page.name} at {width} pixels: {found['wide'][:5]}"
            assert found["console"] == [] and found["loaded"] == []
            assert found["images"] and not found["broken"]
            assert not found["small"], f"{page.name}: {found['small']} texts smaller than 11 pixels"
    assert measured[400]["headings"] == ["Loss", "Loss"]


def test_the_probe_sees_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<html><body><p style="width:900px">wide</p><img src="http://localhost:9/missing.png"><script>nothing()</script>'
        '<h2>Here</h2><p style="font-size:7px">small</p></body></html>',
        encoding="utf-8",
    )
    found = measure(page, tmp_path, 400)[400]
    assert found["wide"] == ["P.: wide"] and found["broken"] == 1 and found["small"] == 1
    assert found["headings"] == ["Here"] and [Path(name).name for name in found["loaded"]] == ["missing.png"]
    assert any("nothing is not defined" in line for line in found["console"])
