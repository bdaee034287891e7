"""The study of what rules are worth runs on toys, goes on where it stopped, and scores as plain formulas do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixlm.errors import ConfigError
from mixlm.scoring.passages import text_prefix
from research.scripts import rule_worth

WORDS = " the river sings and one bird falls under two stone light of the tree turns to cloud over"
MODELS = ["-m", "toy:1", "-m", "toy:2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("".join(f" {word}" for word in rng.choice(WORDS.split(), 500)))
    return tmp_path / "text.txt"


def test_a_text_that_leaves_nothing_behind_its_prompts_is_refused(text: Path) -> None:
    with pytest.raises(SystemExit, match="no passage of words is longer than its prompt of 250 bytes at --train 200"):
        rule_worth.text_items([f"words={text}"], 200, 900)


def test_texts_are_scored_as_plain_formulas_do(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rule_worth, "PROMPT_BYTES", 100)
    sizes = ["--train", "300", "--check", "300"]
    arguments = ["texts", f"words={text}", *MODELS, *sizes, "--out", str(tmp_path / "out")]
    rule_worth.main(arguments)
    first = capsys.readouterr().out
    monkeypatch.setattr("mixlm.scoring.rule_scores.RuleScorer.score", None)  # nothing is scored again
    rule_worth.main(arguments)
    assert capsys.readouterr().out == first
    assert "| guidance |" in first.replace("  |", " |")

    item = next(item for item in rule_worth.text_items([f"words={text}"], 300, 300) if not item.fitted)
    record = next(
        row
        for row in map(json.loads, (tmp_path / "out" / "texts.jsonl").read_text().splitlines())
        if row["index"] == item.index
    )
    ensemble = rule_worth.load_members(["toy:1", "toy:2"], None)
    rows = []
    for member, before in zip(ensemble.members, (item.prompt, item.prompt, b""), strict=True):
        engine = member.engine
        prefix = [*text_prefix(engine), *engine.encoder.encode(before).ids]
        targets = engine.encoder.encode(item.data).ids
        logits = engine.session().logits(np.array(prefix + targets[:-1]), last=len(targets)).astype(np.float64)
        rows.append(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    large, small, bare = rows

    def expected(scores: np.ndarray) -> float:
        places = np.arange(len(targets))
        return float((scores[places, targets] - np.logaddexp.reduce(scores, axis=1)).sum())

    values = dict(zip(rule_worth._NAMES, record["logprobs"], strict=True))
    for name, scores in {
        ("large", ""): large,
        ("small", ""): small,
        ("average", "weight 0.3"): np.logaddexp(np.log(0.3) + large, np.log(0.7) + small),
        ("geometric", "weight 0.7, strength 1.15"): 1.15 * (0.7 * large + 0.3 * small),
        ("power", "r -1, weight 0.6"): -np.logaddexp(np.log(0.6) - large, np.log(0.4) - small),
        ("max", ""): np.maximum(large, small),
        ("min", ""): np.minimum(large, small),
        ("contrastive", "strength 0.25"): 1.25 * large - 0.25 * small,
        ("guidance", "strength 1.5"): 1.5 * small - 0.5 * bare,
    }.items():
        assert values[name] == pytest.approx(expected(scores), rel=1e-5), name


def test_answers_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {
            "question": f"What {i}?",
            "choices": {"text": ["the river", "one bird"], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i in range(8)
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, lines[:5])))
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines[5:])))
    page = tmp_path / "page.md"
    page.write_text("<!-- results: worth-answers -->\n<!-- end of results -->\n")
    files = [f"arc={tmp_path / 'arc.jsonl'}", "--fit", str(tmp_path / "other.jsonl"), "--page", str(page)]
    rule_worth.main(["answers", *files, *MODELS, "--out", str(tmp_path / "out")])
    assert "13 of 13 scored" in capsys.readouterr().out
    assert "| rule | fitted | arc (5) |" in page.read_text()
    scored = [json.loads(line)["logprobs"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(scored) == 13  # each answer for itself
    number = rule_worth._NAMES.index(("small", ""))
    per_byte = np.array([row[number] for row in scored[:10]]).reshape(5, 2) / [len(" the river"), len(" one bird")]
    right = (per_byte.argmax(axis=1) == np.arange(5) % 2).mean()
    assert f"| toy:2 |  | {right:.1%}" in page.read_text()

    # Other questions are not taken for those that were scored.
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, reversed(lines[:5]))))
    with pytest.raises(ConfigError, match="of another request"):
        rule_worth.main(["answers", *files, *MODELS, "--out", str(tmp_path / "out")])

    with pytest.raises(SystemExit):
        rule_worth.main(["answers", *files[:1], *MODELS])
    assert "answers need --fit" in capsys.readouterr().err
