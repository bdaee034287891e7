"""The page, in a browser: what a person does with it and sees."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import endless, running

from mixlm.loading import load
from mixlm.server.api_keys import Keys, hashed

PAGE = Path(__file__).resolve().parents[2] / "src" / "mixlm" / "server" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-long-and-random-key"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as one:
        started = one.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong silently."""
    context = browser.new_context()
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda one: wrong.append(one.text) if one.type == "error" else None)
    page.wrong = wrong
    yield page
    context.close()
    assert [one for one in wrong if "401" not in one and "400" not in one] == []


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:enabled")


def test_nothing_is_loaded_from_elsewhere():
    for file in PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|\bimport\b", text), file.name
    assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", (PAGE / "index.html").read_text())


@needs_browser
def test_a_conversation(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    assert page.inner_text(".legend").split("\n")[0].startswith("toy:1 weight 50 %")
    page.click("summary")
    page.fill("[name=seed]", "7")
    page.fill("[name=max_tokens]", "12")
    ask(page, "hello")
    expected = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=12)
    assert page.inner_text(".reply") == expected.text
    tokens = page.query_selector_all(".reply .m")
    colours = {"toy:1": "m0", "toy:2": "m1"}
    assert [one.get_attribute("class").split()[1] for one in tokens] == [colours[one.member] for one in expected.tokens]
    assert len({one.evaluate("one => getComputedStyle(one).color") for one in tokens}) == 2
    # A token tells its probability, and what could have come in its place.
    told = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=12, alternatives=5).tokens[1]
    assert page.is_hidden("#card")
    tokens[1].hover()
    said = page.inner_text(".token")
    assert told.member in said
    assert f"probability {100 * math.exp(told.logprob):.0f} %" in said
    rows = [one.inner_text().split("\n") for one in page.query_selector_all("#card li")]
    assert {json.loads(text) for text, _ in rows if text != '"<|endoftext|>"'} >= {
        one.data.decode() for one in told.top_logprobs if one.data
    }
    shares = [float(share.removesuffix(" %")) for _, share in rows]
    assert shares == pytest.approx([100 * math.exp(one.logprob) for one in told.top_logprobs], abs=0.51)
    assert json.loads(page.inner_text("#card .drawn").split("\n")[0]) == told.text
    box, token = page.query_selector("#card").bounding_box(), tokens[1].bounding_box()
    assert box["y"] >= token["y"] + token["height"] or box["y"] + box["height"] <= token["y"]
    page.hover("#prompt")
    assert page.is_hidden("#card")
    # Who ran when, and what it saved.
    assert len(page.query_selector_all(".timeline rect")) == len(expected.tokens)
    assert f"{len(expected.tokens)} tokens" in page.get_attribute(".timeline", "aria-label")
    figures = page.inner_text(".figures")
    forwards = sum(one.forwards for one in expected.usage.members.values())
    assert f"{forwards} of {2 * expected.usage.tokens}" in figures
    assert "saved" in figures
    # What was said stays part of the conversation.
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and then?")
    messages = sent.value.post_data_json["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == expected.text
    page.click("#anew")
    assert page.query_selector(".reply") is None


@needs_browser
def test_settings_are_sent(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=max_tokens]", "30")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hello")
    assert sent.value.post_data_json["mixlm"] == {"method": "mixture"}  # what was not touched is the ensemble's own
    weights = page.query_selector_all(".weights input")
    weights[0].fill("0")
    page.fill("[name=temperature]", "1.2")
    page.fill("[name=top_k]", "5")
    page.select_option("[name=method]", "conventional")
    assert "0 %" in page.inner_text(".weights")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hello")
    body = sent.value.post_data_json
    assert body["mixlm"] == {"method": "conventional", "weights": [0, 0.5], "top_k": 5}
    assert body["temperature"] == 1.2
    assert page.query_selector_all(".reply")[1].query_selector(".m0") is None
    page.select_option("[name=method]", "greedy")
    assert page.is_disabled("[name=temperature]")


@needs_browser
def test_the_timeline_shows_everyone_who_ran(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=seed]", "7")
    page.fill("[name=max_tokens]", "8")
    page.select_option("[name=method]", "conventional")
    ask(page, "hello")
    expected = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=8, method="conventional")
    assert len(page.query_selector_all(".timeline rect")) == 2 * len(expected.tokens)
    assert len(page.query_selector_all(".timeline .besides")) == len(expected.tokens)
    about = page.get_attribute(".timeline", "aria-label")
    assert f"toy:1 ran {len(expected.tokens)} times, toy:2 ran {len(expected.tokens)} times" in about


@needs_browser
def test_a_unit_is_chosen(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    page.fill("[name=seed]", "3")
    page.select_option("[name=method]", "conventional")
    page.select_option("[name=unit]", "word")
    # Methods that a unit has no law for are not offered.
    assert page.input_value("[name=method]") == "mixture"
    assert page.query_selector("[name=method] option[value=conventional]") is None
    assert "by word" in page.inner_text("summary")
    ask(page, "hello")
    assert (
        page.inner_text(".reply").strip() == load("toy:1", "toy:2", unit="word").generate("hello", seed=3).text.strip()
    )
    page.select_option("[name=unit]", "piece")
    assert page.query_selector("[name=method] option[value=conventional]")


@needs_browser
def test_two_settings_side_by_side(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.check("#compare")
    assert len(page.query_selector_all(".pane")) == 2
    page.click(".pane:nth-child(1) summary")
    page.fill(".pane:nth-child(1) [name=seed]", "3")
    ask(page, "hello")
    left, right = (one.inner_text() for one in page.query_selector_all(".reply"))
    pair = load("toy:1", "toy:2")
    assert left == pair.generate("hello", seed=3).text
    assert right == pair.generate("hello", seed=3, method="single").text
    page.uncheck("#compare")
    assert len(page.query_selector_all(".pane")) == 1


@needs_browser
def test_keys_alone_do(toys, page):
    """Tab reaches everything, Enter sends, the arrows go from token to token, and a reader is told of the end."""
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
        if page.evaluate("document.activeElement.className") == "reply":
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
    assert page.query_selector(".reply .m:last-child.current")
    page.keyboard.press("Home")
    assert page.inner_text(".token") == first
    for control in page.query_selector_all("input, select, textarea, button"):
        named = control.evaluate("one => one.labels?.length || one.textContent || one.getAttribute('aria-label')")
        assert named, control.evaluate("one => one.outerHTML")


@needs_browser
def test_the_page_follows_a_reply_unless_one_looks_elsewhere(page):
    page.set_viewport_size({"width": 380, "height": 500})
    with running(endless(0.002)) as one:
        page.goto(one.url)
        page.wait_for_selector(".legend li")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")

        def height() -> float:
            return page.evaluate("document.documentElement.scrollHeight")

        one.wait(lambda: height() > 700)
        assert page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY") < 40
        page.evaluate("scrollTo(0, 0)")
        before = height()
        one.wait(lambda: height() > before + 60)
        assert page.evaluate("scrollY") == 0
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled")
        page.goto("about:blank")


@needs_browser
def test_escape_stops_a_reply(page):
    with running(endless(0.02)) as one:
        page.goto(one.url)
        page.wait_for_selector(".legend li")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".reply .m:nth-child(5)")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled")
        one.wait(lambda: one.server.worker.unended == 0)
        assert one.metric("mixlm_closed_total", reason="gone") == 1
        page.goto("about:blank")


@needs_browser
def test_a_key_is_asked_for(page):
    with running(load("toy:1", "toy:2"), Keys({hashed(KEY): "ada"})) as one:
        page.goto(one.url)
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".legend li")
        ask(page, "hello")
        assert page.inner_text(".reply")
        page.goto("about:blank")


@needs_browser
def test_a_refusal_is_shown(toys, page):
    page.goto(toys.url)
    page.wait_for_selector(".legend li")
    page.click("summary")
    for weight in page.query_selector_all(".weights input"):
        weight.fill("0")
    ask(page, "hello")
    assert "at least one must be greater than 0" in page.inner_text(".error")


@needs_browser
def test_what_a_model_writes_is_text_and_not_markup(page):
    from toys import fixed

    from mixlm.ensemble import Ensemble, MemberSpec

    markup = b"<img src=x onerror=alert(1)>"
    evil = fixed({markup: 1.0}, [markup, *(bytes([i]) for i in range(256))])
    with running(Ensemble([MemberSpec(evil, "<b>m</b>")])) as one:
        page.goto(one.url)
        page.wait_for_selector(".legend li")
        page.click("summary")
        page.fill("[name=max_tokens]", "2")
        ask(page, "<i>hello</i>")
        assert page.inner_text(".reply") == markup.decode() * 2
        assert page.inner_text(".said") == "<i>hello</i>"
        assert page.query_selector("img, i, b b") is None
        page.goto("about:blank")


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
    # By chance a reply may be empty, or one member write none of it.
    wrote: list[str] = []
    for _ in range(10):
        ask(page, "hello " + "averyverylongword" * 20)
        wrote = [one for one in (".reply .m0", ".reply .m1") if page.query_selector(one)]
        if wrote:
            break
    assert wrote
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [one.bounding_box() for one in page.query_selector_all(".pane")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 736)
    for selector in (*wrote, ".said", "#about", ".figures dt"):
        assert contrast(page, selector) >= 4.5, selector
    context.close()


def contrast(page: Any, selector: str) -> float:
    """The contrast of a text with what it stands on, by WCAG 2."""
    text, ground = page.evaluate(
        """selector => {
            const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const rgb = (colour) => { pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
                return [...pixel.getImageData(0, 0, 1, 1).data]; };
            let one = document.querySelector(selector);
            const text = rgb(getComputedStyle(one).color);
            while (one && rgb(getComputedStyle(one).backgroundColor)[3] === 0) one = one.parentElement;
            return [text, rgb(getComputedStyle(one).backgroundColor)];
        }""",
        selector,
    )

    def light(rgb: list[int]) -> float:
        linear = [c / 12.92 if (c := one / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for one in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(text), light(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)
