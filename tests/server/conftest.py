from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsing import CHROMIUM
from serving import RunningServer, ServerProcess, endless, running

from mixlm.loading import load


@pytest.fixture(scope="module")
def toys() -> Iterator[RunningServer]:
    """A server of two toys."""
    with running(load("toy:1", "toy:2")) as server:
        yield server


@pytest.fixture(scope="module")
def endless_toys() -> Iterator[RunningServer]:
    """A server of two toys that never end a text; 12 tokens are the default."""
    with running(endless(max_tokens=12)) as server:
        yield server


@pytest.fixture
def start_process() -> Iterator[Callable[..., ServerProcess]]:
    """Start `mixlm serve`."""
    processes: list[ServerProcess] = []

    def start(*arguments: str, **options: Any) -> ServerProcess:
        processes.append(ServerProcess(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors fail the test, and whose requests go to its own server."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    requests: list[str] = []
    yield page
    context.close()
    expected = ("401", "400", "ERR_CONNECTION_REFUSED")
    assert [message for message in wrong if not any(status in message for status in expected)] == []
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "about:", "blob:"))] == []
