# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: nothing sticks out of the page at phone and desktop width, it is not blank, its
script runs under its own policy, and it is dark where the reader's system is."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import matplotlib.image
import pytest

from peft_linear.selection import Settings, recommend
from tests.helpers.pages import HISTORY, MODELS, made
from tests.helpers.planted import planted_kernels


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
WIDTHS = (400, 1280)
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const root = frame.contentDocument.documentElement;
    const wide = [...root.querySelectorAll("main *")].filter((e) =>
      !e.closest(".scroll, pre, svg, .hidden") && e.getBoundingClientRect().right > frame.clientWidth + 0.5);
    return {page: frame.name, width: frame.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
      out: wide.map((e) => e.tagName), sortable: root.querySelectorAll("th button").length,
      rows: root.querySelectorAll("table.sortable tbody tr").length};
  });
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""
SORT = """
addEventListener("load", () => {
  const root = document.querySelector("iframe").contentDocument;
  const head = [...root.querySelectorAll("table.sortable th")].find((e) => e.textContent.startsWith("parameters"));
  const read = () => [...root.querySelectorAll("table.sortable tbody tr")].map((row) => +row.cells[0].textContent);
  const orders = [0, 1].map(() => (head.querySelector("button").click(), [head.getAttribute("aria-sort"), read()]));
  document.querySelector("pre").textContent = JSON.stringify(orders);
});
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")


def run_browser(folder, page, *arguments):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def in_frames(pages, script):
    """A page that shows others in frames, of the same origin, and writes what its script finds into its <pre>."""
    frames = "".join(
        f'<iframe name="{escape(name)}" srcdoc="{escape(page)}" width="{width}" height="900" frameborder="0"></iframe>'
        for name, width, page in pages
    )
    return f"<!DOCTYPE html><html><body>{frames}<pre></pre><script>{script}</script></body></html>"


def what_it_found(dom):
    return json.loads(unescape(re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL)[-1]))


@pytest.fixture(scope="module")
def page():
    rec = recommend(planted_kernels(names=MODELS["bert"], informative=(3, 8)), 3)
    return rec.to_html(history=HISTORY, measured={"accuracy": 0.7})


def test_nothing_sticks_out_at_any_width(page, tmp_path):
    long = "encoder_with_a_name_that_has_no_dots_and_does_not_end_" * 3
    about = {"model_class": long}
    pages = {
        "bert": page,
        "t5": made(MODELS["t5"]).to_html(),
        "experts": made(MODELS["experts"]).to_html(),
        "long": made([f"{long}.0.{long}", long], notes=(long,), settings=Settings(kernels=about)).to_html(),
    }
    frames = [(name, width, content) for name, content in pages.items() for width in WIDTHS]
    found = what_it_found(run_browser(tmp_path, in_frames(frames, MEASURE), "--dump-dom"))
    assert [(entry["page"], entry["width"]) for entry in found] == [frame[:2] for frame in frames]
    for entry in found:
        assert entry["content"] <= entry["width"] and not entry["out"], entry
        assert entry["height"] > 1500
        assert entry["sortable"] >= 7, "the script did not run: is the hash in the policy its own?"
    assert found[0]["rows"] == 13


def test_a_click_sorts_the_candidates(tmp_path):
    kernels = planted_kernels(names=MODELS["bert"][:4], informative=(1,), examples=9, sizes=[500, 90, 1000, 70])
    rec = recommend(kernels, 1)
    rank = {row.parameters: row.rank for row in rec.scores}
    dom = run_browser(tmp_path, in_frames([("page", 1280, rec.to_html())], SORT), "--dump-dom")
    up = [rank[size] for size in (70, 90, 500, 1000)]
    assert what_it_found(dom) == [["ascending", up], ["descending", up[::-1]]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_not_blank_in_either_scheme(page, tmp_path, scheme):
    image = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    run_browser(tmp_path, page, f"--screenshot={image}", "--window-size=1280,1600", *dark)
    pixels = matplotlib.image.imread(image)[..., :3]
    assert pixels.shape[:2] == (1600, 1280)
    background = pixels[800, 3]
    assert background.mean() < 0.2 if scheme == "dark" else background.mean() > 0.9
    written = (abs(pixels - background).max(axis=2) > 0.3).mean()
    assert 0.01 < written < 0.5, "a page has ink, and more paper than ink"
    bands = (abs(pixels - background).max(axis=2) > 0.3).reshape(8, -1).mean(axis=1)
    assert (bands > 0.002).all(), "every eighth of the first screens has something on it"
