"""The report of a real run in a real browser: its sections, its console, and its widths on a desktop and a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.longspan_cli import forked, train
from tests.train.test_report import SECTIONS

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")

# Runs inside the page: what sticks out of it, and which texts of a drawing lie over each other.
_PROBE = """
<script>
addEventListener('load', function () {
  var root = document.documentElement, said = [root.scrollWidth + ' of ' + root.clientWidth];
  document.querySelectorAll('svg').forEach(function (svg) {
    if (!svg.getClientRects().length) return;
    var frame = svg.getBoundingClientRect(), texts = [].slice.call(svg.querySelectorAll('text'));
    var boxes = texts.map(function (text) { return text.getBoundingClientRect(); });
    boxes.forEach(function (a, i) {
      if (a.left < frame.left - 1 || a.right > frame.right + 1) said.push('OUTSIDE ' + texts[i].textContent);
      boxes.slice(i + 1).forEach(function (b, k) {
        var wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        var high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 4) said.push('OVER ' + texts[i].textContent + ' / ' + texts[i + 1 + k].textContent);
      });
    });
  });
  parent.document.querySelector('pre').textContent += said.join('\\n') + '\\n---\\n';
});
</script>
"""


def dump(url: str, profile: Path) -> tuple[str, str]:
    """The page's elements after its scripts ran, and what the browser's console had."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={profile}", "--window-size=1400,900", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(page: str, widths: tuple[int, ...]) -> str:
    """A page of frames of these widths, each with the report and the probe; media queries see a frame's width."""
    inside = html.escape(page.replace("</body>", f"{_PROBE}</body>"))
    frames = [f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{inside}"></iframe>' for width in widths]
    return f"<!DOCTYPE html><html><body><pre></pre>{''.join(frames)}</body></html>"


def measured(page: str, widths: tuple[int, ...], folder: Path) -> list[list[str]]:
    """For each width "SCROLL of CLIENT", and what sticks out or overlaps."""
    (folder / "frames.html").write_text(probed(page, widths), encoding="utf-8")
    dom, console = dump(f"file://{folder / 'frames.html'}", folder / "browser")
    assert console == ""
    found = re.search(r"<pre>(.*?)</pre>", dom, re.S)
    assert found is not None
    said = [each.strip().splitlines() for each in html.unescape(found[1]).split("---\n") if each.strip()]
    return sorted(said, key=lambda lines: int(lines[0].split(" of ")[1]))


@pytest.mark.timeout(240)
def test_a_real_run_in_a_real_browser(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--batch.steps", "6", "--eval.tokens", "256", "--eval.contexts", "16", "64", "--profile")
    forked(*train(out, *options), world=2).good()
    page = (out / "report.html").read_text(encoding="utf-8")
    narrow, wide = measured(page, (390, 1280), tmp_path)
    assert narrow == ["390 of 390"] and wide == ["1280 of 1280"]
    for name in SECTIONS:
        assert f'<section id="{name}"' in page
    for words in ("longspan: run", "rank 1, backward", "data 1 × context 2", "parameters: ", "held out at 64"):
        assert words in page, words
    # The probe bites: a wide element, and a text over another.
    bad = page.replace("<main>", '<main><div style="width:2000px">x</div>')
    bad = re.sub(r"(<text[^>]*>rank 1</text>)", r"\1\1", bad)
    worse = measured(bad, (1280,), tmp_path)[0]
    assert worse[0] != "1280 of 1280" and any(line.startswith("OVER rank 1") for line in worse)
