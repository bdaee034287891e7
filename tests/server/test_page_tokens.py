"""The page, in a browser: who wrote what, alternatives, branches, Markdown, and how it looks."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from browsing import COMPLETIONS, TOKENS, contrast, fact, finished, last_text, needs_browser, send, stream_of, visit
from serving import endless, running, wait

from mixlm.loading import load

pytestmark = [needs_browser, pytest.mark.slow]

MARKDOWN = """# A title

Some *emphasis* and `code`, [a link](https://example.org/x) and ![a picture](https://example.org/p.png).

- [x] done

```python
print("hello")
```

| a | b |
|---|--:|
| 1 | 2 |

<img src=x onerror=alert(1)><script>alert(2)</script> [bad](javascript:alert(3)) <style>body{display:none}</style>
"""


def card_rows(page: Any) -> list[tuple[str, float]]:
    """The tokens on the card with their probabilities, in percent."""
    rows = [row.split("\n") for row in page.locator("#card > ol > li").all_inner_texts()]
    return [(text, float(share.removesuffix(" %").removeprefix("< "))) for text, share in rows]


def test_tokens_show_their_member_and_their_alternatives(toys, page):
    visit(page, toys.url, seed=7, max_tokens=12)
    send(page, "hello")
    expected = load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=12, top_logprobs=5)
    assert last_text(page) == expected.text
    nodes = page.locator(TOKENS)
    colours = {"toy:1": "m0", "toy:2": "m1"}
    assert [node.get_attribute("class").split()[1] for node in nodes.all()] == [
        colours[token.member] for token in expected.tokens
    ]
    assert len(set(nodes.evaluate_all("nodes => nodes.map(node => getComputedStyle(node).color)"))) == 2
    second = expected.tokens[1]
    assert page.is_hidden("#card")
    nodes.nth(1).hover()
    assert second.member in page.inner_text("#token")
    assert f"probability {100 * math.exp(second.logprob):.0f} %" in page.inner_text("#token")
    rows = card_rows(page)
    assert {json.loads(text) for text, _ in rows if text != "end of text"} >= {
        top.data.decode() for top in second.top_logprobs if top.data
    }
    shares = [100 * math.exp(top.logprob) for top in second.top_logprobs]
    assert [share for _, share in rows] == pytest.approx(shares, abs=0.51)
    assert json.loads(page.inner_text("#card .sampled").split("\n")[0]) == second.text
    box, token = page.locator("#card").bounding_box(), nodes.nth(1).bounding_box()
    assert box["y"] >= token["y"] + token["height"] or box["y"] + box["height"] <= token["y"]
    page.hover("#prompt")
    assert page.is_hidden("#card")
    # What it took.
    assert page.locator(".timeline rect").count() == len(expected.tokens)
    assert page.get_attribute(".timeline", "aria-label").startswith(f"Forward passes: {len(expected.tokens)} tokens")
    forwards = sum(member.forwards for member in expected.usage.members.values())
    everyone = 2 * expected.usage.tokens
    assert fact(page, "saved") == f"{100 * (1 - forwards / everyone):.0f} % saved"
    assert page.get_attribute(".facts .saved", "title").startswith(f"{forwards} forwards")
    assert page.get_attribute(".facts .finish", "title") == f"finish_reason: {expected.finish_reason}"


def test_the_timeline_shows_every_member_that_ran(toys, page):
    visit(page, toys.url, seed=7, max_tokens=8)
    page.select_option("[name=method]", "conventional")
    send(page, "hello")
    count = len(load("toy:1", "toy:2").generate("hello", seed=7, max_tokens=8, method="conventional").tokens)
    assert page.locator(".timeline rect").count() == 2 * count
    assert page.locator(".timeline .other").count() == count
    assert f"toy:1 ran {count} times, toy:2 ran {count} times" in page.get_attribute(".timeline", "aria-label")


def test_keyboard_only(endless_toys, page):
    """Tab reaches everything, Enter sends, the arrows go from token to token, and the end is announced."""
    page.goto(endless_toys.url)
    page.wait_for_selector(".welcome .member")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    finished(page)
    assert re.match(r"\d+ tokens?\. toy:", page.inner_text("#status"))
    assert page.evaluate("document.activeElement.id") == "prompt"
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.who')"):
            break
    first = page.inner_text("#token")
    assert page.is_visible("#card")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#card")
    second = page.inner_text("#token")
    assert second not in ("", first)
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.inner_text("#token") == second
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.matches('#card button')")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.matches('.who')")
    page.keyboard.press("End")
    assert page.locator(".who .m:last-child.current").count() == 1
    page.keyboard.press("Home")
    assert page.inner_text("#token") == first
    for control in page.query_selector_all("input, select, textarea, button, summary"):
        label = control.evaluate("node => node.labels?.length || node.textContent || node.getAttribute('aria-label')")
        assert label, control.evaluate("node => node.outerHTML")


def test_a_finger_opens_the_card_and_it_stays(endless_toys, browser):
    context = browser.new_context(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(endless_toys.url)
    page.wait_for_selector(".welcome .member")
    page.tap(".examples button:nth-child(2)")
    finished(page)
    page.locator(TOKENS).first.tap()
    assert page.is_visible("#card")
    assert page.locator("#card .others button").count() == 3
    page.locator(".prompt").tap()
    assert page.is_hidden("#card")
    # The text has most of the screen.
    assert page.locator("#scroller").bounding_box()["height"] > 0.75 * 700
    page.tap("#toggle-settings")
    page.wait_for_selector("#settings:visible")
    page.touchscreen.tap(10, 300)
    assert page.is_hidden("#settings")
    context.close()


def test_a_branch_from_an_alternative(toys, page):
    visit(page, toys.url, seed=7, max_tokens=8)
    send(page, "hello")
    original = page.locator(TOKENS).all_inner_texts()
    page.locator(TOKENS).nth(2).click()
    alternative = page.locator("#card > ol button").first
    token = json.loads(alternative.inner_text().split("\n")[0])
    with page.expect_request(COMPLETIONS) as request:
        alternative.click()
    finished(page)
    body = request.value.post_data_json
    begin = "".join(original[:2]) + token
    assert body["messages"][-1] == {"role": "assistant", "content": begin}
    messages = [{"role": "user", "content": "hello"}, body["messages"][-1]]
    rest = load("toy:1", "toy:2").generate(messages, seed=body["seed"], max_tokens=8, continue_final_message=True)
    assert last_text(page) == begin + rest.text
    assert page.locator(TOKENS).nth(2).get_attribute("class") == "m forced"
    assert page.inner_text(".turn > .pager") == "2 of 2"
    page.click("[aria-label='Previous version']")
    assert page.locator(TOKENS).all_inner_texts() == original


def test_what_each_member_would_have_said(toys, page):
    visit(page, toys.url, seed=7, max_tokens=8)
    send(page, "hello")
    tokens = page.locator(TOKENS).all_inner_texts()
    page.locator(TOKENS).nth(2).click()
    page.click("#card .wide")
    page.wait_for_selector("#card .answers section")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "".join(tokens[:2])}]
    for i, name in enumerate(("toy:1", "toy:2")):
        section = page.locator("#card .answers section").nth(i)
        assert section.locator("b").inner_text() == name
        said = load(name).generate(messages, max_tokens=1, top_logprobs=5, continue_final_message=True, seed=7).tokens
        expected = ["end of text", "sampled"]
        if said:
            likely = said[0].top_logprobs[0]
            text = json.dumps(likely.data.decode()) if likely.data else "end of text"
            expected = [text, f"{100 * math.exp(likely.logprob):.0f} %"]
        assert section.locator("li").first.inner_text().split("\n") == expected
    # Go on with one member alone.
    with page.expect_request(COMPLETIONS) as request:
        page.click("#card .others button:nth-child(3)")
    finished(page)
    body = request.value.post_data_json
    assert body["mixlm"]["weights"] == [0, 1]
    assert {node.get_attribute("class") for node in page.locator(TOKENS).all()[2:]} <= {"m m1", "m m1 unlikely"}


def test_a_completion_that_was_cut_short_goes_on(endless_toys, page):
    visit(page, endless_toys.url, max_tokens=2)
    send(page, "hello")
    assert fact(page, "finish") == "reached 2 tokens"
    begin = last_text(page)
    page.click(".actions :text('Go on')")
    page.wait_for_selector(".who .m:nth-child(4)")
    finished(page)
    assert last_text(page).startswith(begin)
    assert (fact(page, "tokens"), page.locator(".pager").count()) == ("4 tokens", 0)


def test_markdown_is_read_and_harmless(toys, page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.route(COMPLETIONS, lambda route: route.fulfill(**stream_of(re.findall(r"\S*\s*", MARKDOWN))))
    visit(page, toys.url)
    send(page, "<i>hello</i>")
    assert last_text(page).startswith("# A title")
    page.check("#view [value=read]", force=True)
    text = page.locator(".text")
    assert text.locator("h1").inner_text() == "A title"
    # The last token has no text: its delta is empty, as that of a part of a character.
    assert text.inner_text().strip().endswith("<style>body{display:none}</style>")
    assert text.locator("em").inner_text() == "emphasis"
    assert text.locator("li input").is_checked()
    assert text.locator("td[align=right]").inner_text() == "2"
    links = text.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/x",
        "https://example.org/p.png",
        None,
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    # HTML is text.
    assert text.locator("img, script, style").count() == 0
    assert "<img src=x onerror=alert(1)><script>alert(2)</script>" in text.inner_text()
    assert page.inner_text(".prompt") == "<i>hello</i>"
    page.click("[aria-label='Copy the code']")
    wait(lambda: page.evaluate("navigator.clipboard.readText()").strip() == 'print("hello")')
    page.reload()
    page.wait_for_selector(".text.read h1")


def test_the_page_follows_a_completion_unless_scrolled_away(page):
    page.set_viewport_size({"width": 380, "height": 500})
    with running(endless(0.002)) as server:
        visit(page, server.url, max_tokens=100000)
        page.click("#close-settings")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")

        def scroller(what: str) -> float:
            function = f"({{ scrollHeight, scrollTop, clientHeight }}) => {what}"
            return page.locator("#scroller").evaluate(function)

        wait(lambda: scroller("scrollHeight") > 700)
        assert scroller("scrollHeight - clientHeight - scrollTop") < 60
        page.evaluate("document.querySelector('#scroller').scrollTop = 0")
        before = scroller("scrollHeight")
        wait(lambda: scroller("scrollHeight") > before + 60)
        assert scroller("scrollTop") == 0
        page.keyboard.press("Escape")
        finished(page)
        page.goto("about:blank")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1200, "dark")])
def test_it_fits_and_can_be_read(endless_toys, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 700})
    page = context.new_page()
    page.goto(endless_toys.url)
    page.wait_for_selector(".welcome .member")
    selectors = [".welcome p", ".examples span", ".legend .m0", ".legend .m1", ".switch span", "#summary"]
    for selector in selectors:
        assert contrast(page, selector) >= 4.5, selector
    page.check("#compare", force=True)
    send(page, "hello " + "averyverylongword" * 20)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [node.bounding_box() for node in page.locator(".completion").all()]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 736)
    for node in page.locator(".completion").all():
        assert node.bounding_box()["x"] + node.bounding_box()["width"] <= width
    for selector in (".prompt", ".facts .tokens", ".facts .m0", ".completion-head"):
        assert contrast(page, selector) >= 4.5, selector
    context.close()
