"""`mixlm score`: figures, the coloured views, JSON, and texts that cannot be scored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import TOYS, Run, Terminal

from mixlm.engines.toy import ToySession
from mixlm.loading import load
from mixlm.routing import LearnedRouter
from mixlm.routing.features import FEATURES
from mixlm.scoring.score import score, score_answers
from mixlm.scoring.scores import router_weights

TEXT = "the river and the stone"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_json_says_what_scoring_finds(run: Run, text: Path) -> None:
    done = run("score", str(text), *TOYS, "-w", "1,3", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    scores = score(load("toy:1", "toy:2"), TEXT)
    weights = np.array([0.25, 0.75])
    assert set(report) == {"unit", "bytes", "bits_per_byte", "perplexity", "segments", "engines", "before"}
    assert (report["unit"], report["bytes"]) == ("token", len(TEXT))
    assert report["bits_per_byte"]["mixture"] == pytest.approx(scores.bits_per_byte(scores.mixture(weights)))
    assert report["bits_per_byte"]["members"] == {
        name: pytest.approx(scores.bits_per_byte(scores.logprobs[:, i])) for i, name in enumerate(scores.names)
    }
    assert "".join(segment["text"] for segment in report["segments"]) == TEXT
    assert sum(segment["logprob"] for segment in report["segments"]) == pytest.approx(scores.mixture(weights).sum())
    for segment in report["segments"]:
        assert set(segment) == {"text", "logprob", "members", "responsibilities"}
        assert set(segment["members"]) == set(segment["responsibilities"]) == {"toy:1", "toy:2"}
        assert sum(segment["responsibilities"].values()) == pytest.approx(1)


def test_a_rule_that_cannot_be_scored_is_refused_before_the_text_is(
    run: Run, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlm.cli.score.score_texts", None)
    done = run("score", str(text), *TOYS, "--unit", "piece", "--rule", "gac")
    assert done.code == 2
    assert "rule gac combines tokens as they are spelled" in done.err


def test_a_byte_order_mark_is_no_text(run: Run, text: Path) -> None:
    plain = run("score", str(text), *TOYS, "--json").out
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    assert run("score", str(text), *TOYS, "--json").out == plain


def test_perplexities_are_those_of_tokens_and_words(run: Run, text: Path) -> None:
    report = json.loads(run("score", str(text), *TOYS, "--json").out)
    ensemble = load("toy:1", "toy:2")
    scores = score(ensemble, TEXT)
    totals = [*scores.logprobs.sum(axis=0), scores.mixture(ensemble.weights).sum()]
    count = len(ensemble.members[0].engine.encoder.encode(TEXT.encode()).ids)
    for name, total in zip(("toy:1", "toy:2", "mixture"), totals, strict=True):
        assert report["perplexity"]["token"][name] == pytest.approx(np.exp(-total / count))
        assert report["perplexity"]["word"][name] == pytest.approx(np.exp(-total / 5))
    apart = json.loads(run("score", str(text), *TOYS, "--json", "--unit", "piece").out)
    assert apart["perplexity"]["token"]["mixture"] is None  # no tokens that all members share


def test_what_stands_before_a_text_is_said_and_chosen(run: Run, text: Path) -> None:
    begin, end = (json.loads(run("score", str(text), *TOYS, "--json", *more).out) for more in ((), ("--before", "end")))
    assert (begin["before"]["toy:1"], end["before"]["toy:1"]) == ("<begin>", "<end>")
    assert begin["bits_per_byte"] != end["bits_per_byte"]
    assert "stands <begin> for toy:1" in run("score", str(text), *TOYS).out
    assert "--before is 'bos'; it must be one of begin, end" in run("score", str(text), *TOYS, "--before", "bos").error
    pairs = text.with_suffix(".jsonl")
    pairs.write_text('{"prompt": "the", "answer": " river"}')
    assert "prompts stand in front of all answers" in run("score", str(pairs), *TOYS, "--before", "end").error


def test_the_table_has_a_row_for_each_member_and_the_mixture(run: Run, text: Path) -> None:
    report = json.loads(run("score", str(text), *TOYS, "--json").out)
    lines = run("score", str(text), *TOYS).out.splitlines()
    for name, bits in (*report["bits_per_byte"]["members"].items(), ("mixture", report["bits_per_byte"]["mixture"])):
        assert any(line.split()[:1] == [name] and f"{bits:.4f}" in line for line in lines)
    assert any("the mixture's probability is exact" in line for line in lines)


def test_by_segment_it_says_where_members_meet(run: Run, text: Path) -> None:
    done = run("score", str(text), *TOYS, "--unit", "piece")
    assert "Segments end where all members have a token boundary" in done.out
    assert json.loads(run("score", str(text), *TOYS, "--unit", "piece", "--json").out)["unit"] == "segment"


def test_standard_input_is_a_text_like_any_other(run: Run, text: Path) -> None:
    piped = run("score", *TOYS, "--json", stdin=TEXT)
    assert (
        piped.out == run("score", str(text), *TOYS, "--json").out == run("score", "-", *TOYS, "--json", stdin=TEXT).out
    )


def test_several_files_have_a_row_each(run: Run, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one bird sings")
    both = json.loads(run("score", str(text), str(other), *TOYS, "--json").out)
    assert [entry["file"] for entry in both["files"]] == [str(text), str(other)]
    for entry, path in zip(both["files"], (text, other), strict=True):
        alone = json.loads(run("score", str(path), *TOYS, "--json").out)
        assert entry["bytes"] == alone["bytes"]
        assert entry["bits_per_byte"]["members"] == pytest.approx(alone["bits_per_byte"]["members"])
    sizes = [entry["bytes"] for entry in both["files"]]
    mean = np.average([entry["bits_per_byte"]["mixture"] for entry in both["files"]], weights=sizes)
    assert both["bits_per_byte"]["mixture"] == pytest.approx(mean)
    assert str(other) in run("score", str(text), str(other), *TOYS).out


def test_an_ensembles_router_weighs_the_text(run: Run, text: Path, tmp_path: Path) -> None:
    gate = LearnedRouter(np.random.default_rng(0).normal(size=(2, FEATURES)), ["toy:1", "toy:2"])
    gate.save(tmp_path / "router.json")
    file = tmp_path / "pair.toml"
    file.write_text(
        '[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n[router]\nkind = "learned"\nfile = "router.json"\n'
    )
    scores = score(load("toy:1", "toy:2"), TEXT)
    expected = scores.bits_per_byte(scores.mixture(router_weights(scores, gate)))
    report = json.loads(run("score", str(text), "-e", str(file), "--json").out)
    assert report["bits_per_byte"]["mixture"] == pytest.approx(expected)
    # The weights differ from place to place, so what is shown is their mean.
    assert "~0." in run("score", str(text), "-e", str(file)).out


def test_a_second_run_reads_nothing_unless_told_to(run: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("score", str(text), *TOYS, "--json")

    def fail(*_: Any) -> None:
        raise RuntimeError("it was read")

    monkeypatch.setattr(ToySession, "forward", fail)
    assert run("score", str(text), *TOYS, "--json").out == first.out
    done = run("score", str(text), *TOYS, "--json", "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert "it was read" in done.err


def test_without_a_cache_nothing_is_kept(run: Run, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    run("score", str(text), *TOYS, "--no-cache")
    assert not (tmp_path / "cache").exists()
    run("score", str(text), *TOYS)
    assert len(list((tmp_path / "cache" / "scores").iterdir())) == 2


@pytest.mark.slow
def test_at_a_terminal_each_part_has_its_members_colour(
    run: Run, text: Path, at_terminal: Callable[..., Terminal]
) -> None:
    report = json.loads(run("score", str(text), *TOYS, "--json").out)
    terminal = at_terminal("score", str(text), *TOYS, "--tokens")
    assert terminal.end() == 0
    assert "\x1b[38;5;32mtoy:1\x1b[0m" in terminal.screen
    assert "dim: likely" in terminal.screen
    shown = ""
    for segment in report["segments"]:
        colour = 32 if segment["responsibilities"]["toy:1"] >= 0.5 else 166
        bits = -segment["logprob"] / np.log(2)
        style = "2;" if bits < 1 else "1;" if bits >= 8 else ""
        shown += f"\x1b[{style}38;5;{colour}m{segment['text']}\x1b[0m"
    assert shown in terminal.screen


def test_without_colours_each_part_has_a_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the river\n the")
    lines = run("score", str(file), *TOYS, "--tokens").out.splitlines()
    assert [line.split()[-1] for line in lines[3:8]] == ["t", "h", "e", "␣river", "⏎"]
    assert "\x1b" not in "".join(lines)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = self._inside or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data if self._inside else ""


def test_the_page_shows_the_text_and_nothing_it_says_is_obeyed(run: Run, tmp_path: Path) -> None:
    bad = "<script>alert('1')</script> & \"quotes\"\n</pre> the\x1b[2J river"
    file, page = tmp_path / "<b>.txt", tmp_path / "page.html"
    file.write_text(bad)
    done = run("score", str(file), *TOYS, "--html", str(page))
    assert done.code == 0
    assert f"written to {page}" in done.err
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.text == bad.replace("\x1b", "␛")
    assert not {"script", "b", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?://|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    spans = [attributes for tag, attributes in parsed.tags if tag == "span" and "data-n" in attributes]
    numbers = json.loads(run("score", str(file), *TOYS, "--json").out)["segments"]
    assert len(spans) == len(numbers)
    for span, record in zip(spans, numbers, strict=True):
        lines = str(span["data-n"]).splitlines()
        assert f"{-record['logprob'] / np.log(2):.2f} bits" in lines[0]
        assert [line.split()[0] for line in lines] == ["mixture", "toy:1", "toy:2"]
        assert ("m0" if record["responsibilities"]["toy:1"] >= 0.5 else "m1") in str(span["class"]).split()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("none.txt",), ("there is no file", "did you mean 'note.txt'?")),
        ((".",), ("is a folder", "name the files in it")),
        (("empty.txt",), ("empty.txt is empty",)),
        (("latin.txt",), ("latin.txt is not UTF-8 text: byte 3 is 0xe9", "convert it first")),
        (("note.txt", "note.txt"), ("note.txt is given twice",)),
        (("note.txt", "--html", "no/page.html"), ("--html no/page.html cannot be written", "there is no folder no")),
        (("note.txt", "--html", "."), ("it is a folder",)),
        (("note.txt", "--top-k", "3"), ("mixlm score does not use --top-k", "omit it")),
        (("note.txt", "--method", "greedy"), ("not use --method",)),
        (("note.txt", "--top-p", "0.5", "--seed", "1"), ("not use --top-p, --seed",)),
        (("note.txt", "--system", "x"), ("--system applies to prompts", ".jsonl")),
        (("note.txt", "--ends"), ("--ends and --no-ends apply to answers", ".jsonl")),
        (("note.txt", "-w", "1"), ("1 weight (1) for 2 members",)),
    ],
)
def test_what_cannot_be_scored(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr("mixlm.loading.load_config", lambda *_, **__: pytest.fail("it was loaded"))
    done = run("score", *arguments, *TOYS)
    assert done.code == 2
    for part in parts:
        assert part in done.error


def test_answers_are_scored_behind_their_prompts(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    pairs = [("Who sings?", " one bird"), ("What falls?", " the stone")]
    path.write_text("".join(json.dumps({"prompt": a, "answer": b}) + "\n" for a, b in pairs))
    ensemble = load("toy:1", "toy:2", weights=[0.3, 0.7])
    for options, about in (((), {}), (("--no-ends",), {"ends": False}), (("--system", "Be brief."), {})):
        settings = ensemble.settings(system="Be brief.") if "--system" in options else None
        expected = score_answers(ensemble, pairs, settings=settings, **about)
        report = json.loads(run("score", str(path), *TOYS, "-w", "3,7", *options, "--json").out)
        assert report["bytes"] == sum(len(answer) for _, answer in pairs)
        bits = expected.bits_per_byte(expected.mixture(ensemble.weights))
        assert report["bits_per_byte"]["mixture"] == pytest.approx(bits)
        assert len(report["segments"]) == len(expected.ends)
    assert "␣one" in run("score", str(path), *TOYS, "--tokens").out
    path.write_text("no json")
    assert "line 1: not valid JSON" in run("score", str(path), *TOYS).error


@pytest.mark.parametrize("stdin", ["", "\n"])
def test_an_empty_standard_input(run: Run, stdin: str) -> None:
    assert "standard input is empty" in run("score", *TOYS, stdin=stdin).error


@pytest.mark.slow
def test_no_text_at_a_terminal(at_terminal: Callable[..., Terminal]) -> None:
    terminal = at_terminal("score", *TOYS)
    assert terminal.end() == 2
    assert "there is no text" in terminal.screen


def test_help(run: Run) -> None:
    done = run("score", "--help")
    assert done.code == 0
    for option in ("--tokens", "--html", "--json", "--no-cache"):
        assert option in done.out
