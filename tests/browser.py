"""A page in headless Chromium, at a given width: what it says on the console, loads, and where it overflows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=2000", "--window-size=1600,1200"),
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Parts that may be wider than the page, because they scroll by themselves.
PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll, pre, .unseen, svg") && e.getBoundingClientRect().right > innerWidth + 1);
  parent.postMessage(JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName + "." + e.className + ": " + e.textContent.slice(0, 60)),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length,
    small: [...document.querySelectorAll("body *")].filter(e => e.children.length == 0 && e.textContent.trim()
      && parseFloat(getComputedStyle(e).fontSize) < 11 && !e.closest(".unseen")).length,
    loaded: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    headings: [...document.querySelectorAll("h2")].map(e => e.textContent),
  }), "*");
});</script>"""
# A window has a least width, a frame has none.
HOST = """<!DOCTYPE html><script>
const all = {};
addEventListener("message", m => {
  const found = JSON.parse(m.data);
  all[found.width] = found;
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(all));
});
</script>"""
FRAME = """<iframe src="{name}" style="width:{width}px;height:1200px;border:0"></iframe>"""


def find_browser() -> str | None:
    """The command of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def console_of(page: Path, folder: Path) -> list[str]:
    """What the page as it is makes the browser say: errors, and requests that its policy refused."""
    result = _run(page, folder)
    return re.findall(r"CONSOLE[^\n]*", result.stderr)


def measure(page: Path, folder: Path, *widths: int, dark: bool = False) -> dict[int, dict]:
    """Load copies of the page that measure themselves; what they find, by width."""
    text = POLICY.sub("", page.read_text(encoding="utf-8"))
    assert "</body>" in text
    copy = folder / f"{page.stem}_copy.html"
    copy.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    host = folder / f"{page.stem}_host.html"
    frames = "".join(FRAME.format(name=copy.name, width=width) for width in widths)
    host.write_text(HOST + frames, encoding="utf-8")
    result = _run(host, folder, dark=dark)
    found = re.search(r'data-found="([^"]*)"', result.stdout)
    assert found, result.stderr[-2000:]
    console = re.findall(r"CONSOLE[^\n]*", result.stderr)
    return {int(width): {**values, "console": console} for width, values in json.loads(unquote(found.group(1))).items()}


def _run(page: Path, folder: Path, *, dark: bool = False) -> subprocess.CompletedProcess:
    browser = find_browser()
    assert browser
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
