"""Takes the pictures of the server's page in docs/, with the demo pair. Needs the extras of `dev` and Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parents[2] / "docs"
MAIN = "import sys; from mixlm.cli import main; sys.exit(main())"


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:enabled", timeout=120_000)


def main() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", "--port", "0", "--max-tokens", "70"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    url = next(match[1] for line in server.stderr if (match := re.match(r"serving .* at (\S+)", line)))
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--no-proxy-server"])
            for scheme, size, compare in (("light", (1280, 760), True), ("dark", (380, 800), False)):
                context = browser.new_context(
                    color_scheme=scheme,
                    viewport={"width": size[0], "height": size[1]},  # type: ignore[arg-type]
                )
                page = context.new_page()
                page.goto(url)
                page.wait_for_selector(".legend li")
                if compare:
                    page.check("#compare")
                page.evaluate("document.querySelector('[name=seed]').value = 7")
                ask(page, "Why is the sky blue?")
                page.locator(".pane:nth-child(1) .reply .m").nth(6).hover()
                page.screenshot(path=DOCS / f"page-{scheme}.png")
                context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
