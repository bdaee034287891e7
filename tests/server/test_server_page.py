"""The page, in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import endless, running, wait

from mixlm.loading import load
from mixlm.server.api_keys import ApiKeys, hash_key

PAGE = Path(__file__).resolve().parents[2] / "src" / "mixlm" / "server" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-long-and-random-key"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors fail the test."""
    context = browser.new_context()
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.wrong = wrong
    yield page
    context.close()
    assert [message for message in wrong if "401" not in message and "400" not in message] == []


def send(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:enabled")


def test_nothing_is_loaded_from_elsewhere():
    for file in PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|\bimport\b", text), file.name
    assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", (PAGE / "index.html").read_text())


@pytest.mark.slow
@needs_browser
def test_a_conversation(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    assert page.inner_text(".legend").split("\n")[0].startswith("toy:1 weight 50 %")
    page.click("summary")
    page.fill("[name=seed]", "7")
    page.fill("[name=max_tokens]", "12")
    send(page, "hello")
    expected = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=12)
    assert page.inner_text(".completion") == expected.text
    nodes = page.query_selector_all(".completion .m")
    colours = {"toy:1": "m0", "toy:2": "m1"}
    assert [node.get_attribute("class").split()[1] for node in nodes] == [
        colours[token.member] for token in expected.tokens
    ]
    assert len({node.evaluate("node => getComputedStyle(node).color") for node in nodes}) == 2
    # A token shows its probability and the alternatives.
    second = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=12, top_logprobs=5).tokens[1]
    assert page.is_hidden("#card")
    nodes[1].hover()
    shown = page.inner_text(".token")
    assert second.member in shown
    assert f"probability {100 * math.exp(second.logprob):.0f} %" in shown
    rows = [node.inner_text().split("\n") for node in page.query_selector_all("#card li")]
    assert {json.loads(text) for text, _ in rows if text != '"<|endoftext|>"'} >= {
        top.data.decode() for top in second.top_logprobs if top.data
    }
    shares = [float(share.removesuffix(" %")) for _, share in rows]
    assert shares == pytest.approx([100 * math.exp(top.logprob) for top in second.top_logprobs], abs=0.51)
    assert json.loads(page.inner_text("#card .sampled").split("\n")[0]) == second.text
    box, token = page.query_selector("#card").bounding_box(), nodes[1].bounding_box()
    assert box["y"] >= token["y"] + token["height"] or box["y"] + box["height"] <= token["y"]
    page.hover("#prompt")
    assert page.is_hidden("#card")
    # The timeline of forward passes, and the number saved.
    assert len(page.query_selector_all(".timeline rect")) == len(expected.tokens)
    assert f"{len(expected.tokens)} tokens" in page.get_attribute(".timeline", "aria-label")
    stats = page.inner_text(".stats")
    forwards = sum(member.forwards for member in expected.usage.members.values())
    assert f"{forwards} of {2 * expected.usage.tokens}" in stats
    assert "saved" in stats
    # The next request has the whole conversation.
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "and then?")
    messages = request.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == expected.text
    page.click("#new")
    assert page.query_selector(".completion") is None


@pytest.mark.slow
@needs_browser
def test_settings_are_sent(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=max_tokens]", "30")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "hello")
    assert request.value.post_data_json["mixlm"] == {"method": "mixture"}  # unchanged settings are not sent
    weights = page.query_selector_all(".weights input")
    weights[0].fill("0")
    page.fill("[name=temperature]", "1.2")
    page.fill("[name=top_k]", "5")
    page.select_option("[name=method]", "conventional")
    assert "0 %" in page.inner_text(".weights")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "hello")
    body = request.value.post_data_json
    assert body["mixlm"] == {"method": "conventional", "weights": [0, 0.5], "top_k": 5}
    assert body["temperature"] == 1.2
    assert page.query_selector_all(".completion")[1].query_selector(".m0") is None
    page.select_option("[name=method]", "greedy")
    assert page.is_disabled("[name=temperature]")


@pytest.mark.slow
@needs_browser
def test_the_timeline_shows_every_member_that_ran(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=seed]", "7")
    page.fill("[name=max_tokens]", "8")
    page.select_option("[name=method]", "conventional")
    send(page, "hello")
    expected = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=8, method="conventional")
    assert len(page.query_selector_all(".timeline rect")) == 2 * len(expected.tokens)
    assert len(page.query_selector_all(".timeline .other")) == len(expected.tokens)
    label = page.get_attribute(".timeline", "aria-label")
    assert f"toy:1 ran {len(expected.tokens)} times, toy:2 ran {len(expected.tokens)} times" in label


@needs_browser
def test_a_unit_is_selected(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=seed]", "3")
    page.select_option("[name=method]", "conventional")
    page.select_option("[name=unit]", "word")
    # Methods that the unit does not support are not offered.
    assert page.input_value("[name=method]") == "mixture"
    assert page.query_selector("[name=method] option[value=conventional]") is None
    assert "by word" in page.inner_text("summary")
    send(page, "hello")
    assert (
        page.inner_text(".completion").strip()
        == load("toy:1", "toy:2", unit="word").generate("hello", seed=3).text.strip()
    )
    page.select_option("[name=unit]", "piece")
    assert page.query_selector("[name=method] option[value=conventional]")


@pytest.mark.slow
@needs_browser
def test_two_settings_side_by_side(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.check("#compare")
    assert len(page.query_selector_all(".pane")) == 2
    page.click(".pane:nth-child(1) summary")
    page.fill(".pane:nth-child(1) [name=seed]", "3")
    send(page, "hello")
    left, right = (node.inner_text() for node in page.query_selector_all(".completion"))
    pair = load("toy:1", "toy:2")
    assert left == pair.generate("hello", seed=3).text
    assert right == pair.generate("hello", seed=3, method="single").text
    page.uncheck("#compare")
    assert len(page.query_selector_all(".pane")) == 1


@pytest.mark.slow
@needs_browser
def test_keyboard_only(toys, page):
    """Tab reaches everything, Enter sends, the arrows go from token to token, and the end is announced."""
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.evaluate("document.querySelector('[name=seed]').value = 7")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    assert re.match(r"Settings: \d+ tokens\. toy:", page.inner_text("#status"))
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.className") == "completion":
            break
    first = page.inner_text(".token")
    assert page.is_visible("#card")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#card")
    assert page.inner_text(".token") not in ("", first)
    second = page.inner_text(".token")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text(".token") == second
    page.keyboard.press("End")
    assert page.query_selector(".completion .m:last-child.current")
    page.keyboard.press("Home")
    assert page.inner_text(".token") == first
    for control in page.query_selector_all("input, select, textarea, button"):
        label = control.evaluate("node => node.labels?.length || node.textContent || node.getAttribute('aria-label')")
        assert label, control.evaluate("node => node.outerHTML")


@pytest.mark.slow
@needs_browser
def test_the_page_follows_a_completion_unless_scrolled_away(page):
    page.set_viewport_size({"width": 380, "height": 500})
    with running(endless(0.002)) as server:
        page.goto(server.url)
        page.wait_for_selector(".legend li")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")

        def height() -> float:
            return page.evaluate("document.documentElement.scrollHeight")

        wait(lambda: height() > 700)
        assert page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY") < 40
        page.evaluate("scrollTo(0, 0)")
        before = height()
        wait(lambda: height() > before + 60)
        assert page.evaluate("scrollY") == 0
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled")
        page.goto("about:blank")


@pytest.mark.slow
@needs_browser
def test_escape_stops_a_completion(page):
    with running(endless(0.02)) as server:
        page.goto(server.url)
        page.wait_for_selector(".legend li")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".completion .m:nth-child(5)")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled")
        wait(lambda: server.app.model_thread.num_unfinished == 0)
        assert server.metric("mixlm_closed_total", reason="gone") == 1
        page.goto("about:blank")


@pytest.mark.slow
@needs_browser
def test_a_key_is_asked_for(page):
    with running(load("toy:1", "toy:2"), ApiKeys({hash_key(KEY): "ada"})) as server:
        page.goto(server.url)
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".legend li")
        send(page, "hello")
        assert page.inner_text(".completion")
        page.goto("about:blank")


@needs_browser
def test_a_refusal_is_shown(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    for weight in page.query_selector_all(".weights input"):
        weight.fill("0")
    send(page, "hello")
    assert "at least one must be greater than 0" in page.inner_text(".error")


@pytest.mark.slow
@needs_browser
def test_generated_text_is_not_markup(page):
    from toys import fixed

    from mixlm.ensemble import Ensemble, MemberSpec

    markup = b"<img src=x onerror=alert(1)>"
    evil = fixed({markup: 1.0}, [markup, *(bytes([i]) for i in range(256))])
    with running(Ensemble([MemberSpec(evil, "<b>m</b>")])) as server:
        page.goto(server.url)
        page.wait_for_selector(".legend li")
        page.click("summary")
        page.fill("[name=max_tokens]", "2")
        send(page, "<i>hello</i>")
        assert page.inner_text(".completion") == markup.decode() * 2
        assert page.inner_text(".prompt") == "<i>hello</i>"
        assert page.query_selector("img, i, b b") is None
        page.goto("about:blank")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_and_can_be_read(toys, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 700})
    page = context.new_page()
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.check("#compare")
    page.click(".pane:nth-child(1) summary")
    # A completion may be empty, or have no token of one member.
    selectors: list[str] = []
    for _ in range(10):
        send(page, "hello " + "averyverylongword" * 20)
        selectors = [selector for selector in (".completion .m0", ".completion .m1") if page.query_selector(selector)]
        if selectors:
            break
    assert selectors
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [node.bounding_box() for node in page.query_selector_all(".pane")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 736)
    for selector in (*selectors, ".prompt", "#about", ".stats dt"):
        assert contrast(page, selector) >= 4.5, selector
    context.close()


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
