"""The study of routers runs on toys, goes on where it stopped, and prints what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from research.scripts import router_page, router_study

WORDS = " the river sings and one bird falls under two stone light of the tree turns to cloud over"


@pytest.mark.slow
def test_texts_and_answers_are_studied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mixlm.fitting.gate_trainer._ITERATIONS", 3)
    monkeypatch.setattr("mixlm.fitting.gate_trainer.PENALTIES", (5e-3,))
    for name, count in (("GATES", 3), ("PRICED", 5), ("DEFERRALS", 4), ("THRESHOLDS", 2)):  # some of them
        attempts = getattr(router_study, name)
        monkeypatch.setattr(router_study, name, dict(list(attempts.items())[::count]))
    rng = np.random.default_rng(0)
    text = "".join(f" {word}" for word in rng.choice(WORDS.split(), 400))
    (tmp_path / "text.txt").write_text(text)
    options = ["-m", "toy:1", "-m", "toy:2", "--out", str(tmp_path / "out"), "--rounds", "50"]
    arguments = ["texts", f"words={tmp_path / 'text.txt'}", *options, "--train", "1200", "--check", "600"]
    router_study.main(arguments)
    first = capsys.readouterr().out
    for name in ("toy:1", "equal", "EM", "a: text, linear", *router_study.POSTERIORS, *router_study.GATES, "oracle"):
        assert f"\n{name} " in first
    rows = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    bits = {row["name"]: row["bits"] for row in rows if "bits" in row}
    # No weights give a segment more than its best member does; deferral can.
    assert all(bits["oracle"] <= value for name, value in bits.items() if not name.startswith("k: defer"))
    monkeypatch.setattr(router_study, "trained", None)  # nothing is trained again
    router_study.main(arguments)
    assert capsys.readouterr().out == first
    # Deferral from the first member to the second stands beside the router.
    assert {*router_study.PRICED, *router_study.DEFERRALS, *router_study.THRESHOLDS} < bits.keys()
    asked = {row["name"]: row["forwards"] for row in rows if row["name"].startswith("k: ")}
    assert all(spent[0] == 1 for spent in asked.values())
    assert asked["k: router, price 0.8"][1] < asked["k: router, price 0"][1]
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- results: pair-texts -->\n<!-- end of results -->\n\nEnd\n")
    router_page.main([f"pair={tmp_path / 'out'}", "--page", str(page)])
    written = page.read_text()
    assert "| i: everything/1, mlp |" in written
    assert "At equal forwards, bits per byte:" in written
    assert "of a token's time" in written
    assert written.endswith("<!-- end of results -->\n\nEnd\n")
    assert (tmp_path / "routers" / "pair.png").stat().st_size > 5000


def test_the_best_router_of_the_page_is_one() -> None:
    texts = {"x": [9, 1]}
    about = {"members": ["m0", "m1"], "sizes": [1, 2], "train": texts, "check": texts, "observe": "m0"}
    figures = {"EM": 2.0, "oracle": 1.0, "a: text, linear": 1.8, "i: history/1, mlp": 1.4, "k: defer, top 0.5": 0.9}
    rest = {"about": about, "interval": (0.0, 0.0), "minus_em": (0.0, 0.0), "forwards": [1.0, 0.5]}
    rows = [{"name": name, "bits": bits, "texts": {"x": bits}, **rest} for name, bits in figures.items()]
    assert "The best router, a: text, linear, closes 20.0%" in router_page.texts_part("pair", rows)


@pytest.mark.slow
def test_answers_are_judged_on_questions_that_nothing_was_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(router_study, "GATES", {"b: top_k, linear": router_study.GATES["b: top_k, linear"]})
    monkeypatch.setattr("mixlm.fitting.gate_trainer._ITERATIONS", 3)
    monkeypatch.setattr("mixlm.fitting.gate_trainer.PENALTIES", (5e-3,))
    lines = [
        {
            "question": f"What {i}?",
            "choices": {"text": ["the river", "one bird"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for i in range(32)
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, lines[:12])))
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines[10:])))  # two are questions of the task
    options = ["-m", "toy:1", "-m", "toy:2", "--out", str(tmp_path / "out"), "--rounds", "50"]
    options += [f"arc={tmp_path / 'arc.jsonl'}", "--fit", str(tmp_path / "other.jsonl")]
    router_study.main(["answers", *options, "--unobserved"])
    first = capsys.readouterr().out
    assert "arc a: text, linear" in first
    assert "top_k" not in first
    assert "observing" not in first
    router_study.main(["answers", *options])
    out = capsys.readouterr().out
    assert "fitted on 20 questions" in out
    assert "of 12  minus" in out
    assert "arc grid over accuracy" in out
    assert "arc b: top_k, linear" in out
    page = tmp_path / "page.md"
    page.write_text("<!-- results: toys-answers -->\n<!-- end of results -->\n")
    router_page.main([f"toys={tmp_path / 'out'}", "--page", str(page)])
    text = " ".join(page.read_text().split())
    assert "| arc (12) | all (12) | forwards a token | of toy" in text
    assert "fitted to 20 other questions (other.jsonl)" in text
