"""The page, in a browser: asking, keeping, going back, comparing, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import COMPLETIONS, fact, finished, last_text, needs_browser, send, stream_of, visit
from serving import endless, running, wait

from mixlm.loading import load
from mixlm.server.api_keys import hash_key
from mixlm.server.page_files import PAGE_FILES

PAGE = Path(__file__).resolve().parents[2] / "src" / "mixlm" / "server" / "page"
KEY = "a-long-and-random-key"
pytestmark = needs_browser


def texts(body: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_every_file_of_the_page_is_served():
    names = {path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*.*")}
    names = {name for name in names if not name.endswith(".md") and name != "index.html"}
    assert {f"/{name}" for name in names} | {"/"} == set(PAGE_FILES)
    for path, (file, _) in PAGE_FILES.items():
        if "/vendor/" not in path:
            text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|//[a-z]+\.|@import", text), path
    assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", (PAGE / "index.html").read_text(encoding="utf-8"))


def test_the_libraries_are_unchanged_files_of_their_packages():
    """What vendor/README.md says of them is true."""
    rows = re.findall(
        r"^\| `([\w.]+)` .* `(LICENSE-\w+)` \| `(\w{64})` \|$", (PAGE / "vendor/README.md").read_text(), re.M
    )
    assert {name for name, _, _ in rows} == {path.name for path in (PAGE / "vendor").glob("*.js")}
    for name, licence, digest in rows:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
        assert (PAGE / "vendor" / licence).stat().st_size > 1000


@pytest.mark.slow
def test_the_first_screen_offers_examples_and_a_conversation_goes_on(endless_toys, page):
    visit(page, endless_toys.url)
    assert page.locator(".examples button").count() == 3
    example = page.inner_text(".examples button:first-child span")
    page.click(".examples button:first-child")
    finished(page)
    assert page.inner_text(".prompt") == example
    first = last_text(page)
    body = send(page, "and then?")
    assert texts(body) == [("user", example), ("assistant", first), ("user", "and then?")]
    page.click("#new")
    assert page.is_visible(".welcome")
    assert texts(send(page, "afresh")) == [("user", "afresh")]
    assert page.locator("#conversations li").count() == 2


@pytest.mark.slow
def test_settings_are_sent_if_they_were_changed(toys, page):
    visit(page, toys.url)
    body = send(page, "hello")
    assert body["mixlm"] == {"method": "mixture"}
    assert "temperature" not in body
    page.locator("[name=weight]").first.fill("0")
    page.fill("[name=temperature]", "1.2")
    page.fill("[name=top_k]", "5")
    page.fill("[name=seed]", "7")
    page.fill("#system", "be brief")
    page.select_option("[name=method]", "conventional")
    assert page.locator(".weights output").all_inner_texts() == ["0 %", "100 %"]
    body = send(page, "hello")
    assert body["mixlm"] == {"method": "conventional", "weights": [0, 0.5], "top_k": 5}
    assert (body["temperature"], body["seed"], texts(body)[0]) == (1.2, 7, ("system", "be brief"))
    # Each unit has its own methods.
    page.select_option("[name=unit]", "word")
    assert page.input_value("[name=method]") == "mixture"
    assert page.locator("[name=method] option[value=conventional]").count() == 0
    page.select_option("[name=unit]", "piece")
    page.select_option("[name=method]", "greedy")
    assert page.is_disabled("[name=temperature]")
    assert "greedy · by piece" in page.inner_text("#summary")
    # Each combination rule has its own methods too, and the units that have them.
    page.select_option("[name=rule]", "max")
    assert page.input_value("[name=method]") == "layered"
    assert page.locator("[name=unit] option").all_inner_texts() == ["token", "piece"]
    body = send(page, "hello")
    assert (body["mixlm"]["rule"], body["mixlm"]["method"]) == ("max", "layered")
    # And parameters of its own.
    assert page.locator(".parameters label").count() == 0
    page.select_option("[name=rule]", "contrastive")
    assert page.locator(".parameters label").count() == 3
    assert page.input_value("[name=form]") == "weighted"
    page.select_option("[name=rule]", "geometric")
    assert "strength" not in send(page, "hello")["mixlm"]
    page.fill("[name=strength]", "0.7")
    mixlm = send(page, "hello")["mixlm"]
    assert (mixlm["rule"], mixlm["strength"]) == ("geometric", 0.7)
    assert page.locator(".error:visible").count() == 0
    page.click(".defaults")
    assert (page.input_value("[name=method]"), page.input_value("[name=rule]")) == ("mixture", "average")
    assert send(page, "hello")["mixlm"] == {"method": "mixture"}


@pytest.mark.slow
def test_the_settings_are_those_of_the_ensemble_that_is_asked(page):
    routed = load("toy:1", "toy:2", router=lambda prompt, text: [1, 2])
    with running({"routed": routed, "three": load("toy:1", "toy:2", "toy:3", rule="max", method="layered")}) as server:
        visit(page, server.url)
        assert page.locator(".weights output").all_inner_texts() == ["router", "router"]
        page.uncheck("[name=routed]")
        page.locator("[name=weight]").first.fill("0.2")
        assert send(page, "hello")["mixlm"] == {"method": "mixture", "weights": [0.2, 0.5]}
        page.check("[name=routed]")
        assert send(page, "hello")["mixlm"] == {"method": "mixture"}
        page.select_option("[name=model]", "three")
        assert page.is_hidden(".router")
        assert page.input_value("[name=rule]") == "max"
        assert page.locator("[name=rule] option[value=contrastive]").count() == 0  # it combines two members
        body = send(page, "hello")
        assert (body["model"], body["mixlm"]) == ("three", {"method": "layered"})
        page.goto("about:blank")


@pytest.mark.slow
def test_a_reload_loses_nothing(endless_toys, page):
    visit(page, endless_toys.url)
    page.select_option("[name=method]", "conventional")
    send(page, "hello")
    before = {name: page.inner_html(f".{name}") for name in ("text", "timeline", "facts")}
    page.reload()
    page.wait_for_selector(".completion")
    assert {name: page.inner_html(f".{name}") for name in before} == before
    assert page.inner_text("#summary").startswith("conventional")
    # Rename, and delete.
    page.hover("#conversations li")
    page.click("[aria-label='Rename hello']")
    page.keyboard.type("A greeting")
    page.keyboard.press("Enter")
    page.wait_for_selector("#conversations :text('A greeting')")
    send(page, "again")
    page.reload()
    page.wait_for_selector(".completion")
    assert page.locator("#conversations .open").all_inner_texts() == ["A greeting"]
    page.hover("#conversations li")
    page.click("[aria-label='Delete A greeting']")
    page.click("#conversations .danger")
    page.wait_for_selector(".welcome")
    page.reload()
    page.wait_for_selector(".welcome")
    assert page.locator("#conversations li").count() == 0


@pytest.mark.slow
def test_what_was_written_again_or_edited_is_another_version(endless_toys, page):
    visit(page, endless_toys.url)
    send(page, "hello")
    first = last_text(page)
    with page.expect_request(COMPLETIONS) as request:
        page.click("[aria-label='Write it again']")
    finished(page)
    assert texts(request.value.post_data_json) == [("user", "hello")]
    second = last_text(page)
    assert page.inner_text(".turn > .pager") == "2 of 2"
    page.click("[aria-label='Previous version']")
    assert last_text(page) == first
    page.click("[aria-label='Next version']")
    assert texts(send(page, "more"))[1] == ("assistant", second)
    # Editing the first question leaves the old turns as a version.
    page.hover(".turn:first-child .question")
    page.click(".turn:first-child [aria-label='Edit and send again']")
    page.keyboard.press("Control+A")
    page.keyboard.type("good bye")
    with page.expect_request(COMPLETIONS) as request:
        page.keyboard.press("Enter")
    finished(page)
    assert texts(request.value.post_data_json) == [("user", "good bye")]
    assert page.locator(".turn").count() == 1
    page.hover(".question")
    page.click(".question [aria-label='Previous version']")
    assert page.locator(".prompt").all_inner_texts() == ["hello", "more"]


@pytest.mark.slow
def test_two_settings_side_by_side_from_one_history(endless_toys, page):
    visit(page, endless_toys.url)
    send(page, "hello")
    page.check("#compare")
    with (
        page.expect_request(COMPLETIONS) as left,
        page.expect_request(
            lambda request: request.url.endswith("completions") and '"single"' in (request.post_data or "")
        ) as right,
    ):
        page.fill("#prompt", "more")
        page.press("#prompt", "Enter")
    finished(page)
    assert texts(left.value.post_data_json) == texts(right.value.post_data_json)
    shown = page.locator(".turn:last-child .text").all_inner_texts()
    conversation = [{"role": role, "content": content} for role, content in texts(left.value.post_data_json)]
    expected = [
        endless().generate(conversation, seed=body["seed"], max_tokens=12, method=body["mixlm"]["method"]).text
        for body in (left.value.post_data_json, right.value.post_data_json)
    ]
    assert shown == expected
    # The conversation goes on from the one that is chosen.
    page.locator(".choose input").nth(1).check()
    page.uncheck("#compare")
    assert texts(send(page, "and more"))[3] == ("assistant", shown[1])


@pytest.mark.slow
def test_a_conversation_is_exported(endless_toys, page):
    visit(page, endless_toys.url)
    send(page, "hello")
    text = last_text(page)
    files = {}
    for kind in ("markdown", "json"):
        page.click("#export summary")
        with page.expect_download() as download:
            page.click(f"#export-{kind}")
        files[kind] = (download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8"))
    assert files["markdown"][0] == "hello.md"
    assert "**You**\n\nhello\n" in files["markdown"][1]
    assert text in files["markdown"][1]
    name, data = files["json"]
    nodes = json.loads(data)["nodes"].values()
    [completion] = [node for node in nodes if node["role"] == "assistant"]
    assert (name, completion["text"]) == ("hello.json", text)
    assert "".join(token["text"] for token in completion["tokens"]) == text


@pytest.mark.slow
def test_a_completion_is_stopped_and_another_conversation_is_read_meanwhile(page):
    with running(endless(0.02)) as server:
        visit(page, server.url)
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".who .m:nth-child(5)")
        page.click("#new")
        assert page.is_visible(".welcome")
        page.click("#conversations .open")
        page.wait_for_selector(".writing .who .m:nth-child(9)")
        page.keyboard.press("Escape")
        finished(page)
        assert fact(page, "finish") == "stopped by you"
        wait(lambda: server.app.model_thread.num_unfinished == 0)
        assert server.metric("mixlm_closed_total", reason="gone") == 1
        # A page that is closed meanwhile keeps the question, and says what happened.
        page.fill("#prompt", "more")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".writing .who .m:nth-child(3)")
        page.reload()
        assert page.locator(".error:visible p").inner_text().startswith("The page was closed")
        assert page.locator(".prompt").all_inner_texts() == ["hello", "more"]
        page.goto("about:blank")


@pytest.mark.slow
def test_errors_keep_the_question(endless_toys, page):
    visit(page, endless_toys.url)
    for weight in page.locator("[name=weight]").all():
        weight.fill("0")
    send(page, "hello")
    assert "at least one must be greater than 0" in page.inner_text(".error")
    assert page.inner_text(".prompt") == "hello"
    page.click(".defaults")
    page.fill("[name=max_tokens]", "5")
    page.click(".error button")
    finished(page)
    assert page.locator(".error:visible").count() == 0
    assert fact(page, "finish") == "reached 5 tokens"
    # A stream that breaks off is not finished.
    page.route(COMPLETIONS, lambda route: route.fulfill(**stream_of(["half", " of"], done=False)))
    send(page, "more")
    assert last_text(page) == "half of"
    assert page.inner_text(".error:visible p") == "The connection ended before the completion did."
    assert fact(page, "finish") == "not finished"
    page.unroute(COMPLETIONS)
    page.route(COMPLETIONS, lambda route: route.abort("connectionrefused"))
    send(page, "and more")
    assert page.locator(".error:visible p").last.inner_text() == "The server cannot be reached. Is it still running?"
    page.unroute(COMPLETIONS)
    # A question that was not answered is not part of the history.
    assert [content for role, content in texts(send(page, "last")) if role == "user"] == ["hello", "more", "last"]


@pytest.mark.slow
def test_a_key_is_asked_for_until_it_is_right(page):
    with running(load("toy:1", "toy:2"), {hash_key(KEY): "ada"}) as server:
        page.goto(server.url)
        page.wait_for_selector("#key[open]")
        assert page.is_hidden("#key-wrong")
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong:visible")
        assert "does not know this key" in page.inner_text("#key-wrong")
        page.click("#key-cancel")
        page.wait_for_selector(".error")
        assert page.inner_text(".error p") == "This server needs an API key."
        page.click(".error button")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".welcome .member")
        send(page, "hello")
        assert fact(page, "finish")
        page.goto("about:blank")
