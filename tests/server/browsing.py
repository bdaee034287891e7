"""What the tests of the page do in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
COMPLETIONS = "**/v1/chat/completions"
TOKENS = ".who .m"


def visit(page: Any, url: str, **settings: Any) -> None:
    """Open the page and its settings, and fill in some of them by name."""
    page.goto(url)
    page.wait_for_selector(".welcome .member")
    page.click("#toggle-settings")
    for name, value in settings.items():
        page.fill(f"[name={name}]", str(value))


def send(page: Any, text: str) -> Any:
    """Ask a question and wait for the end of the completion. Returns the body of the (first) request."""
    page.fill("#prompt", text)
    with page.expect_request(COMPLETIONS) as request:
        page.press("#prompt", "Enter")
    finished(page)
    return request.value.post_data_json


def finished(page: Any) -> None:
    """Wait until nothing is being written."""
    page.wait_for_selector("body[aria-busy=false] .facts .finish")


def last_text(page: Any) -> str:
    return page.inner_text(".turn:last-child .completion:last-child .text")


def fact(page: Any, name: str) -> str:
    """Something of the line below the last completion."""
    return page.inner_text(f".turn:last-child .completion:last-child .facts .{name}")


def stream_of(pieces: Sequence[str], *, done: bool = True) -> dict[str, Any]:
    """A response to fulfill a request with: a stream of these texts, a token each; its delta has no empty text."""
    chunks = [
        {
            "choices": [
                {
                    "delta": {"content": piece} if piece else {},
                    "finish_reason": None,
                    "logprobs": {"content": [{"token": piece, "logprob": -0.1, "top_logprobs": []}]},
                    "mixlm": {"members": ["toy:1"], "forwards": {"toy:1": 1}},
                }
            ]
        }
        for piece in pieces
    ]
    last = {"choices": [{"delta": {}, "finish_reason": "stop", "mixlm": {"members": []}}]}
    events = [json.dumps(chunk) for chunk in ([*chunks, last] if done else chunks)] + ["[DONE]"] * done
    return {"content_type": "text/event-stream", "body": "".join(f"data: {event}\n\n" for event in events)}


def contrast(page: Any, selector: str) -> float:
    """The contrast of a text with its background, by WCAG 2."""
    text, ground = page.evaluate(
        """selector => {
            const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const rgb = (colour) => { pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
                return [...pixel.getImageData(0, 0, 1, 1).data]; };
            let node = document.querySelector(selector);
            const text = rgb(getComputedStyle(node).color);
            while (node && rgb(getComputedStyle(node).backgroundColor)[3] === 0) node = node.parentElement;
            return [text, rgb(getComputedStyle(node).backgroundColor)];
        }""",
        selector,
    )

    def light(rgb: list[int]) -> float:
        linear = [c / 12.92 if (c := channel / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for channel in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(text), light(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)
