"""The study of routers runs on toys, goes on where it stopped, and prints what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from research.scripts import router_study

WORDS = " the river sings and one bird falls under two stone light of the tree turns to cloud over"


@pytest.mark.slow
def test_texts_and_answers_are_studied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mixlm.fitting.gate_trainer._EPOCHS", 2)
    monkeypatch.setattr("mixlm.fitting.gate_trainer.DECAYS", (0.1,))
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
    bits = {row["name"]: row["bits"] for row in rows}
    assert bits["oracle"] == min(bits.values())
    assert rows[-1]["forwards"] != rows[0]["forwards"]
    monkeypatch.setattr(router_study, "trained", None)  # nothing is trained again
    router_study.main(arguments)
    assert capsys.readouterr().out == first


def test_answers_are_judged_on_questions_that_nothing_was_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(router_study, "GATES", {"b: top_k, linear": router_study.GATES["b: top_k, linear"]})
    monkeypatch.setattr("mixlm.fitting.gate_trainer._EPOCHS", 2)
    monkeypatch.setattr("mixlm.fitting.gate_trainer.DECAYS", (0.1,))
    lines = [
        {
            "question": f"What {i}?",
            "choices": {"text": ["the river", "one bird"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for i in range(24)
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["-m", "toy:1", "-m", "toy:2", "--out", str(tmp_path / "out"), "--rounds", "50"]
    router_study.main(["answers", f"arc={tmp_path / 'arc.jsonl'}", *options, "--questions", "24"])
    out = capsys.readouterr().out
    assert "arc: 24 questions scored" in out
    assert "of 12  minus" in out
    assert "arc b: top_k, linear" in out
