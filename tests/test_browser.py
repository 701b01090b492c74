"""The report in a real browser: nothing logged, nothing cut off, readable in light and dark; skipped where there is none.

Needs `pip install playwright` and a Chromium of the system (``apt-get install chromium-headless-shell``).
"""

import shutil

import pytest
from conftest import change, run

from timm_sfr.reporting.page import write_report

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

# The lowest contrast (WCAG 2) of any text with what lies behind it, and the text.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => { for (; one; one = one.parentElement) {
    const c = parse(getComputedStyle(one).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  let worst = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, one = node.parentElement;
    if (!node.data.trim() || one.closest("script, svg, style")) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.data.trim()];
  }
  return worst;
}"""
# Elements that reach beyond the window's sides, and figures' texts that reach out of their figure.
CUT_OFF = """() => [
  ...[...document.querySelectorAll("main *, header *")].filter(e => !e.closest("svg, .scroll, pre")
    && e.getBoundingClientRect().right > innerWidth + 1),
  ...[...document.querySelectorAll("svg text")].filter(e => { const t = e.getBoundingClientRect(),
    s = e.closest("svg").getBoundingClientRect();
    return t.left < s.left - 2 || t.right > s.right + 2 || t.bottom > s.bottom + 2; }),
].map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(digits_run, tmp_path_factory):
    return write_report(shutil.copytree(digits_run[0], tmp_path_factory.mktemp("browser") / "run"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_nothing_is_logged_or_cut_off_and_all_can_be_read(chromium, page_file, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert not said and [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, f"{text!r}: {ratio:.1f}"
    page.close()


def test_pointing_at_a_location_shows_its_teachers(chromium, page_file):
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    lesson = page.locator(".lesson").first
    plan = lesson.evaluate("one => JSON.parse(one.dataset.plan)")
    left, right = (lesson.locator("svg").nth(side).locator("rect") for side in (0, 1))
    opacity = "cells => cells.map(cell => Number(cell.style.fillOpacity))"
    for index in (0, 5, len(plan) - 1):
        left.nth(index).hover(force=True)
        shares = dict(map(tuple, plan[index]))
        most = max(shares.values())
        expected = [0.85 * shares.get(place, 0) / most for place in range(right.count())]
        assert right.evaluate_all(opacity) == pytest.approx(expected, abs=1e-5)
    right.nth(3).click(force=True)
    shares = [dict(map(tuple, row)).get(3, 0) for row in plan]
    expected = [0.85 * share / max(shares) for share in shares]
    assert left.evaluate_all(opacity) == pytest.approx(expected, abs=1e-5)
    page.close()


def test_the_comparison_is_readable_too(chromium, finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    change(other / "args.yaml", seed=43)
    done = run("timm-sfr", "compare", finished, other, "--html", tmp_path / "c.html")
    assert done.returncode == 0, done.stderr
    page = chromium.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "c.html").as_uri())
    assert not said and page.evaluate("document.documentElement.scrollWidth") <= 390 and page.evaluate(CUT_OFF) == []
    assert page.evaluate(CONTRAST)[0] >= 4.5
    page.close()
