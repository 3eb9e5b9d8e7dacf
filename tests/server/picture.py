"""Makes docs/page.png: the page over the embedded model, with a reply on it and every slot busy.

python -m tests.server.picture docs/page.png [--seconds 60] [--scheme dark]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

from tests.server.test_page import NAMES
from tests.serving import started

ARGUMENTS = ["--max-slots", "16", "--max-model-len", "1024", "--page-size", "16", "--prefill-chunk", "64"]
STEMS = ["import os\n", "class Page:\n    ", "def main():\n    ", "for line in open(path):\n    "]


def traffic(url: str, seed: int, stop: threading.Event) -> None:
    """One client after the other, with prompts that begin alike."""
    draw = random.Random(seed)
    while not stop.is_set():
        body = {
            "model": "jaxserve-embedded",
            "prompt": draw.choice(STEMS) * draw.randint(5, 60),
            "max_tokens": draw.randint(20, 300),
            "service_tier": draw.choice(["default", "default", "flex"]),
        }
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        stop.wait(draw.random())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic before it")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, NAMES)))
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        started(Path(folder), [*ARGUMENTS, "--data-dir", folder]) as server,
        sync_playwright() as playwright,
    ):
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=options.scheme)
        page.goto(server.url)
        clients = [
            threading.Thread(target=traffic, args=(server.url, seed, stop), daemon=True) for seed in range(20)
        ]
        for number, client in enumerate(clients):
            client.start()
            time.sleep(options.seconds / 40 if number > 8 else 0)
        page.wait_for_timeout(options.seconds * 500)
        page.fill("#max_tokens", "48")
        page.fill("#seed", "7")
        page.fill("#prompt", "write the function that adds two numbers")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".assistant .figures", timeout=60_000)
        page.fill("#prompt", "and one that reads a file")
        page.fill("#max_tokens", "400")
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(1500)
        page.locator(".assistant .token.p2, .assistant .token.p3").nth(3).hover()
        page.screenshot(path=str(options.out))
        stop.set()
        browser.close()
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
