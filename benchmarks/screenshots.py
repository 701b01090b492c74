"""Takes pictures of a run's report in a browser, for the documentation: docs/images/report-{desktop,phone,dark}.png.

    python train_sfr.py --epochs 8 --experiment pictured
    python -m benchmarks.screenshots output/train/pictured

It needs `pip install playwright pillow` and an installed Chromium (``apt-get install chromium-headless-shell``).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.accuracy import HERE

IMAGES = HERE.parent / "docs" / "images"
# Name, width, colour scheme, the element at the top of the picture, and the height in pixels.
SHOTS = (
    ("report-desktop", 1280, "light", "header", 1500),
    ("report-phone", 390, "light", "header", 1400),
    ("report-dark", 1280, "dark", "#sfr", 1100),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes the pictures; returns 0, or 2 if there is no browser or no report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(arguments)
    from timm_sfr.cli.parser import fail

    page_file = args.run / "report.html"
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        return fail("browser: no Chromium was found; install chromium-headless-shell")
    if not page_file.is_file():
        return fail(f"run: there is no report in {str(args.run)!r}")
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, width, scheme, start, height in SHOTS:
            page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(page_file.absolute().as_uri())
            top = page.locator(start).bounding_box()["y"]
            whole = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            part = whole.crop((0, max(0, int(top) - 16), width, min(whole.height, int(top) + height)))
            part.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(IMAGES / f"{name}.png", optimize=True)
            print(IMAGES / f"{name}.png")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
