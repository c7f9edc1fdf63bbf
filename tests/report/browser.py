"""A page as a browser without a screen shows it: what its scripts have made of it, and what they complained about."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_SECONDS = 120
SETTLING_MS = 4000
"""Of the browser's own, virtual time."""
FRAME = """<!DOCTYPE html><html><head><meta name="color-scheme" content="light dark"></head><body style="margin:0">
<iframe src="page.html" style="border:0;display:block;width:{width}px;height:{height}px"></iframe>
<script type="application/json" id="seen"></script>
<script>addEventListener("message", (e) => document.getElementById("seen").textContent = e.data);</script>
</body></html>"""
PROBE = """<script>addEventListener("load", () => setTimeout(() => {{
  const plots = Array.from(document.querySelectorAll(".plot"));
  const drawn = plots.filter((plot) => plot.querySelector("svg.main-svg")).length;
  const page = document.documentElement.cloneNode(true);
  page.querySelectorAll("script").forEach((script) => script.remove());
  const seen = {{ dom: page.outerHTML, plots: plots.length, drawn, probed: {probe} }};
  top.postMessage(encodeURIComponent(JSON.stringify(seen)), "*");
}}, {settling}));</script></body>"""


@dataclass(frozen=True)
class Opened:
    """A page after its scripts have run."""

    dom: str
    """As HTML, without the scripts."""
    plots: int
    """Places for figures."""
    drawn: int
    """Those in which plotly has drawn something."""
    probed: Any
    """What the probe gave."""
    console: list[str]
    """What was written to the console: errors, warnings, refused requests."""


def find_browser() -> str:
    """The first browser on PATH; skips the test where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser on PATH to open the page in ({', '.join(NAMES)})")


def open_page(
    page: Path,
    *,
    width_px: int = 1280,
    height_px: int = 900,
    dark: bool = False,
    probe: str = "null",
    screenshot: Path | None = None,
) -> Opened:
    """Open a file, with no network to reach; `probe` is an expression of JavaScript, evaluated when all is drawn.

    `screenshot`: also a picture for people, at the size given. The page is shown in a frame, since a browser's own
    window is never narrower than 500 pixels.
    """
    browser = find_browser()
    with tempfile.TemporaryDirectory() as folder:
        before, end, after = page.read_text(encoding="utf-8").rpartition("</body>")
        assert end, f"{page} has no </body>"
        copy = before + PROBE.format(probe=probe, settling=SETTLING_MS) + after
        (Path(folder) / "page.html").write_text(copy, encoding="utf-8")
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.format(width=width_px, height=height_px), encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width_px},{height_px}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--virtual-time-budget={2 * SETTLING_MS}",
            *([] if screenshot is None else [f"--screenshot={screenshot}"]),
            "--dump-dom",
            frame.as_uri(),
        ]
        environment = {**os.environ, "HOME": folder, "XDG_CONFIG_HOME": folder, "XDG_CACHE_HOME": folder}
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=TIMEOUT_SECONDS
        )
    seen = re.search(r'id="seen">([^<]+)<', found.stdout)
    assert seen, f"the page did not load: {found.stderr[-2000:]}"
    console = [line for line in found.stderr.splitlines() if ":CONSOLE" in line]
    return Opened(**json.loads(unquote(seen[1])), console=console)
