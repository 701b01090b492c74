"""Pictures of a run's report in a browser, for the documentation: docs/images/report-{desktop,phone,dark}.png.

    python train_sfr.py --epochs 8 --experiment pictured
    python -m benchmarks.screenshots output/train/pictured

Needs `pip install playwright pillow` and a Chromium of the system (``apt-get install chromium-headless-shell``).
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
# Name, width, colour scheme, and what is shown: from which element on, and how many pixels.
SHOTS = (
    ("report-desktop", 1280, "light", "header", 1500),
    ("report-phone", 390, "light", "header", 1400),
    ("report-dark", 1280, "dark", "#sfr", 1100),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 2 where there is no browser or no report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args(arguments)
    from timm_sfr.cli.parser import fail

    page_file = args.run / "report.html"
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None or not page_file.is_file():
        return fail(f"expected a Chromium here and a report in {args.run}; got {browser} and {page_file.is_file()}")
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
