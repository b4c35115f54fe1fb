"""What a real browser makes of a page: a headless Chromium measures it, photographs it and prints it.

`measure` loads pages in frames of the wanted widths, which may be narrower than any window, and runs `MEASURE` inside.
"""

import html
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASURE = """
function measure(view) {
  const page = view.document, faults = [], width = page.documentElement.clientWidth;
  for (const each of page.querySelectorAll("details")) each.open = true;
  const say = (what, element) => {
    const text = element.textContent.trim().replace(/\\s+/g, " ").slice(0, 60);
    faults.push(what + ": <" + element.tagName + " class=" + element.getAttribute("class") + "> " + text);
  };
  if (page.documentElement.scrollWidth > width) faults.push("the page scrolls sideways");
  for (const element of page.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest("svg, .plain")) continue;
    if (box.left < -0.5 || box.right > width + 0.5) say("outside the page", element);
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth && !element.querySelector(".plain"))
      say("does not hold its content", element);
  }
  const charts = {};
  for (const drawing of page.querySelectorAll("figure > svg")) {
    const frame = drawing.getBoundingClientRect(), texts = [...drawing.querySelectorAll("text")];
    const name = drawing.parentElement.id, boxes = texts.map((text) => text.getBoundingClientRect());
    if (frame.width < 200 || frame.height < 20) faults.push("too small: " + name);
    texts.forEach((text, index) => {
      const box = boxes[index];
      if (box.height < 9) faults.push(name + ": too small to read: " + text.textContent);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 ||
          box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        faults.push(name + ": outside its drawing: " + text.textContent);
      for (let other = 0; other < index; other++) {
        const [a, b] = [box, boxes[other]], slack = 0.12 * Math.min(a.height, b.height);
        if (a.left < b.right && b.left < a.right && a.top + slack < b.bottom && b.top + slack < a.bottom)
          faults.push(name + ": overlap: " + text.textContent + " and " + texts[other].textContent);
      }
    });
    const legend = [...drawing.parentElement.querySelectorAll(".legend li")].map((entry) => entry.textContent.trim());
    charts[name] = [...texts.map((text) => text.textContent), ...legend];
  }
  const loaded = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  return { faults, charts, loaded, height: page.documentElement.scrollHeight };
}
"""
_MEASURE_ALL = """
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => measure(frame.contentWindow));
  document.body.textContent = JSON.stringify(found);
  document.body.id = "found";
};
"""


def find_chromium() -> str | None:
    """Return where a Chromium is, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def measure(pages: Sequence[Path], widths: Sequence[int]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what was found in each page at each width, by the page's file name and the width.

    That is: `faults`, a sentence each; `charts`, all labels of each by its id; `loaded`, addresses that the page asked
    for; `height` in pixels.
    """
    frames = [(page, width) for page in pages for width in widths]
    body = "".join(
        f'<iframe src="{html.escape(page.as_uri())}" style="width:{width}px;height:900px;border:0"></iframe>'
        for page, width in frames
    )
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "wrapper.html"
        wrapper.write_text(f"<!doctype html><body>{body}<script>{MEASURE}{_MEASURE_ALL}</script>", encoding="utf-8")
        dump = _run(["--dump-dom", "--window-size=1400,1000", wrapper.as_uri()])
    found = json.loads(html.unescape(dump.partition('<body id="found">')[2].partition("</body>")[0]))
    return {(page.name, width): each for (page, width), each in zip(frames, found, strict=True)}


def photograph(page: Path, width: int, height: int, to: Path, dark: bool = False) -> None:
    """Write a PNG of a page at a width, as tall as is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "wrapper.html"
        look = f"width:{width}px;height:{height}px;border:0;display:block"
        frame = f'<iframe src="{html.escape(page.as_uri())}" style="{look}"></iframe>'
        style = f"<style>body {{ margin: 0 }} :root {{ color-scheme: {'dark' if dark else 'light'} }}</style>"
        wrapper.write_text(f"<!doctype html>{style}{frame}", encoding="utf-8")
        scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        _run([*scheme, f"--screenshot={to}", f"--window-size={max(width, 500)},{height}", wrapper.as_uri()])


def print_out(page: Path, to: Path) -> None:
    """Write a page as a PDF, as a printer would get it."""
    _run([f"--print-to-pdf={to}", "--no-pdf-header-footer", page.as_uri()])


def _run(arguments: Sequence[str]) -> str:
    chromium = find_chromium()
    assert chromium is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--allow-file-access-from-files", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout
