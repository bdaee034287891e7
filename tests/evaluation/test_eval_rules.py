"""Tasks under a combination rule: continuations against brute force, greediness, and what a run compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scored_texts import rule_logprob
from small_tasks import toys

from mixlm.core.combinations import combination
from mixlm.core.options import GenerationOptions
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.evaluation.lm import EnsembleLM
from mixlm.scoring.rule_scores import RuleScorer, text_passages


@dataclass
class Asked:
    args: tuple[Any, ...]
    doc_id: int = 0
    resps: list[Any] = field(default_factory=list)


def with_rule(rule: str, **options: Any) -> Ensemble:
    ensemble = toys(**options)
    defaults = GenerationOptions(method="layered", rule=rule)
    return Ensemble(ensemble.members, ensemble.weights.tolist(), unit=ensemble.unit, defaults=defaults)


def test_a_continuation_has_the_rules_log_probability() -> None:
    ensemble, data = with_rule("geometric"), " turns under\nit"
    engines = [member.engine for member in ensemble.members]
    before, ids = engines[0].prompts.raw("the river").tolist(), engines[0].encoder.encode(data.encode()).ids
    expected = 0.0
    for i, token in enumerate(ids):
        rows = []
        for engine in engines:
            logits = np.asarray(engine.table((*before, *ids[:i])), dtype=np.float32).astype(np.float64)
            logits[engine.vocabulary.size - 2] = -np.inf  # what begins a prompt is never sampled
            rows.append(np.exp(logits - np.logaddexp.reduce(logits)))
        expected += float(np.log(combination("geometric").combine(np.array(rows), ensemble.weights)[token]))
    [(logprob, greedy)] = EnsembleLM(ensemble).loglikelihood([Asked(("the river", data))])
    assert logprob == pytest.approx(expected, rel=1e-9)
    assert greedy is False


@pytest.mark.parametrize("piece", [False, True])
def test_greedy_is_what_the_method_greedy_writes(piece: bool) -> None:
    ensemble = with_rule("max", piece=piece)
    scored = 0
    for context in ("the", "the river", "one", "one bird", "two", "under", "a", "of it"):
        completion = ensemble.generate(context, raw=True, method="greedy", max_tokens=2)
        text = completion.text
        if text.encode() != b"".join(token.data for token in completion.tokens) or not text.isascii() or len(text) < 2:
            continue  # bytes that are no text
        [(logprob, greedy), (_, other)] = EnsembleLM(ensemble).loglikelihood(
            [Asked((context, text)), Asked((context, text[:-1] + "~"))]
        )
        assert greedy is True
        assert other is False
        assert logprob >= sum(token.logprob for token in completion.tokens) - 1e-6  # other spellings count too
        scored += 1
    assert scored


def test_texts_are_scored_as_score_does_and_one_member_alone_without_the_rule() -> None:
    ensemble = with_rule("power")
    [rolling] = EnsembleLM(ensemble).loglikelihood_rolling([Asked(("the bird sings",))])
    assert rolling == pytest.approx(rule_logprob(ensemble, text_passages(ensemble, ["the bird sings"])), rel=1e-9)
    request = Asked(("the", " river"))
    [alone] = EnsembleLM(ensemble, options={"method": "single"}).loglikelihood([request])
    [first] = EnsembleLM(Ensemble(ensemble.members[:1])).loglikelihood([request])
    assert alone == first
    # The rule may be an option of the run.
    plain = Ensemble(ensemble.members, ensemble.weights.tolist())
    [expected], [actual] = (
        EnsembleLM(e, options=o).loglikelihood([request])
        for e, o in ((ensemble, {}), (plain, {"rule": "power", "method": "layered"}))
    )
    assert actual == expected
    assert actual != EnsembleLM(plain).loglikelihood([request])[0]


def test_texts_are_scored_by_one_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    built, begin = [], RuleScorer.__init__
    monkeypatch.setattr(RuleScorer, "__init__", lambda *arguments: built.append(begin(*arguments)))
    EnsembleLM(with_rule("power")).loglikelihood_rolling([Asked(("the bird",)), Asked(("the river",))])
    assert len(built) == 1


def test_what_has_no_log_probability_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rule gac combines tokens as they are spelled"):
        EnsembleLM(with_rule("gac", piece=True)).loglikelihood([Asked(("the", " river"))])
