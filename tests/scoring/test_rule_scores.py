"""The log-probability of a text under a rule, against plain sums over all ways to spell it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scored_texts import rule_logprob
from toys import END, OPTIONS, engine, exact_distribution, make_ensemble, toys

from mixlm.core.combinations.union_top_k import UnionTopK
from mixlm.core.options import GenerationOptions
from mixlm.engines.toy import ToyEngine, random_table
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.routing import FunctionRouter
from mixlm.scoring.rule_scores import RuleScorer, text_passages

PLAIN = OPTIONS["plain"]


def with_rule(ensemble: Ensemble, rule: str, **options) -> Ensemble:
    defaults = GenerationOptions(method="layered", rule=rule, **options)
    return Ensemble(ensemble.members, ensemble.weights.tolist(), unit=ensemble.unit.name, defaults=defaults)


def combined(ensemble: Ensemble, before: bytes) -> dict[bytes, float]:
    """What the rule makes of the members behind bytes, by the toys' tables."""
    pieces = [before] if before else []
    rows = []
    for i in range(len(ensemble.members)):
        alone = Ensemble([ensemble.members[i]], unit="piece")
        rows.append(exact_distribution(alone, PLAIN, "", pieces))
    keys = sorted({key for row in rows for key in row})
    probs = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
    return dict(zip(keys, ensemble.defaults.combination.combine(probs, ensemble.weights), strict=True))


def spelled(ensemble: Ensemble, text: bytes, before: bytes = b"") -> float:
    """The probability of the text, over all symbols that may begin it."""
    if not text:
        return 1.0
    distribution = combined(ensemble, before)
    return sum(
        probability * spelled(ensemble, text[len(key) :], before + key)
        for key, probability in distribution.items()
        if key != END and text.startswith(key)
    )


@pytest.mark.parametrize("rule", ["geometric", "max", "vote"])
def test_in_piece_it_is_the_sum_over_all_spellings(rule):
    ensemble = with_rule(toys("piece", 3), rule)
    for text in ("ab", "ab cb"):
        expected = np.log(spelled(ensemble, text.encode()))
        assert np.isclose(rule_logprob(ensemble, text_passages(ensemble, [text])), expected, atol=1e-5)


def test_the_top_k_of_a_union_is_the_rules_own():
    scores = []
    for rule, sampling in (("union-top-k", {"top_k": 2}), ("unite", {"top_k": 2}), (UnionTopK(k=2), {})):
        ensemble = with_rule(toys("token", 2), rule, sampling=sampling)
        completion = ensemble.generate("ab cab", raw=True, score_prompt=True, max_tokens=0)
        scores.append(rule_logprob(ensemble, text_passages(ensemble, ["ab cab"])))
        assert sum(token.logprob for token in completion.prompt) == pytest.approx(scores[-1])
    assert scores == pytest.approx([scores[0]] * 3)
    wider = with_rule(toys("token", 2), "union-top-k")
    assert rule_logprob(wider, text_passages(wider, ["ab cab"])) != pytest.approx(scores[0])
    with pytest.raises(ConfigError, match="top_k is 0, and rule union-top-k joins"):
        RuleScorer(with_rule(toys("token", 2), "union-top-k", sampling={"top_k": 0}))


def test_in_token_it_is_the_sum_over_the_tokens_and_the_end_counts():
    ensemble = with_rule(toys("token", 2).with_weights([1, 1]), "contrastive", alpha=0.0)
    [passage] = text_passages(ensemble, ["ab c"])
    passage = replace(passage, scores_end=True)
    options = {"raw": True, "method": "conventional", "temperature": 1.0, "top_k": 0}
    total, text = 0.0, ""
    for symbol in [*ensemble.members[0].engine.encoder.encode(b"ab c").ids, ensemble.unit.end]:
        following = ensemble.distribution(text, **options)
        total += float(np.log(following.probs[following.symbols == symbol][0]))
        text += "" if symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(symbol).decode()
    assert np.isclose(rule_logprob(ensemble, [passage]), total, atol=1e-5)


def test_nothing_is_read_behind_a_token_without_probability(monkeypatch):
    ensemble = with_rule(toys("token", 2).with_weights([1, 1]), "contrastive", alpha=1.0)
    passages = text_passages(ensemble, ["ab c ab c"]) * 3
    scored, score = [], RuleScorer.score
    monkeypatch.setattr(RuleScorer, "score", lambda self, passage: scored.append(1) or score(self, passage))
    assert rule_logprob(ensemble, passages) == -np.inf
    assert len(scored) == 1


def test_what_has_no_probability_of_bytes_is_refused():
    pieces = toys("piece", 2)
    for rule in ("gac", "unite"):
        with pytest.raises(UnsupportedError, match=f"rule {rule} combines tokens as they are spelled"):
            rule_logprob(with_rule(pieces, rule), [])
    routed = toys("piece", 2, router=FunctionRouter(lambda prompt, text: [1, 1], 2))
    routed.defaults = GenerationOptions(method="layered", rule="max")
    with pytest.raises(UnsupportedError, match="weights that are fixed"):
        rule_logprob(routed, [])


def test_tokens_that_members_do_not_share_are_refused():
    # The first member has a token for "ab", and the second spells it in two.
    members = [ToyEngine([b"a", b"b", word], random_table(5, seed)) for word, seed in ((b"ab", 1), (b"", 2))]
    ensemble = with_rule(make_ensemble(members, [0.5, 0.5], unit="token"), "geometric")
    with pytest.raises(UnsupportedError, match="m0 has 'ab' where m1 has 'a'"):
        rule_logprob(ensemble, text_passages(ensemble, ["bab"]))
    assert np.isfinite(rule_logprob(ensemble, text_passages(ensemble, ["ba"])))


def test_guidance_of_a_bare_text_is_refused_where_it_would_change_nothing():
    toy = engine()
    one_model = with_rule(make_ensemble([toy, toy]), "guidance")
    with pytest.raises(ConfigError, match=r"both prompts of rule guidance are the same.*or bare text"):
        RuleScorer(one_model).logprobs(text_passages(one_model, ["ab"]))
    [passage] = text_passages(one_model, ["ab"])
    first, second = (toy.prompts.raw(prompt) for prompt in ("a", "b"))
    total = RuleScorer(one_model).logprobs([replace(passage, prefixes=[first, second])])
    assert np.isfinite(total).all()
