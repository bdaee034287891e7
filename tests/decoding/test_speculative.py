from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import OPTIONS, SHARED, engine, make_ensemble, toys

from mixlm.decoding import StrategyContext
from mixlm.decoding.auto import Auto
from mixlm.decoding.blocks import join_requests
from mixlm.decoding.cost_model import (
    DraftPlan,
    ForwardCostEstimator,
    ForwardCosts,
    mixture_seconds,
    speculative_seconds,
)
from mixlm.decoding.drafts import LookupDraft, lookup_continuation
from mixlm.decoding.speculative import speculative
from mixlm.engines.requests import Forward, LogitsRequest
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.sequence import SpeculationStats
from mixlm.routing import FunctionRouter

DRAFTS = ("lookup", "m0", "m1")


def same_text(ensemble, method, **options):
    """Compare with the mixture's pieces, who wrote them, and their log-probabilities."""
    draft = {name: options.pop(name) for name in ("draft", "block") if name in options}
    expected = ensemble.generate("ab", method="mixture", raw=True, **options)
    completion = ensemble.generate("ab", method=method, raw=True, **options, **draft)
    assert [(token.data, token.member) for token in completion.tokens] == [
        (token.data, token.member) for token in expected.tokens
    ]
    assert completion.finish_reason == expected.finish_reason
    np.testing.assert_allclose([t.logprob for t in completion.tokens], [t.logprob for t in expected.tokens], atol=1e-12)
    return completion, expected


def drafted(ensemble, draft, block, **options):
    return same_text(ensemble, "speculative", draft=draft, block=block, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_text_is_the_mixtures_token_for_token(unit, members, name):
    ensemble = toys(unit, members)
    for sequence, draft in enumerate(DRAFTS):
        for block in (1, 3):
            options = {"seed": 3, "sequence": sequence, "max_tokens": 30, **OPTIONS[name]}
            drafted(ensemble, draft, block, ignore_end=block == 3, **options)


@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_weights_may_depend_on_the_text(unit, draft):
    def by_last_byte(prompt, text):
        return [0.8, 0.1, 0.1] if text[-1:] in (b"a", b"") else [0.1, 0.3, 0.6]

    ensemble = toys(unit, 3, router=FunctionRouter(by_last_byte, 3))
    for sequence in range(10):
        drafted(ensemble, draft, 3, seed=1, sequence=sequence, max_tokens=25)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["speculative", "auto", "greedy"])
def test_a_completion_ends_where_a_context_is_full_and_after_its_stop(method):
    ensemble = make_ensemble([engine(seed=1, context_length=14), engine(seed=2, context_length=30)])
    reference = "greedy" if method == "greedy" else "mixture"
    draft = {} if method == "auto" else {"draft": "m1"}
    for sequence in range(8):
        options = {"raw": True, "seed": 2, "sequence": sequence, "max_tokens": 40, "ignore_end": True}
        for extra in ({}, {"stop": "cb"}, {"max_tokens": 5}):
            settings = {**options, **extra}
            expected = ensemble.generate("ab", method=reference, **settings)
            completion = ensemble.generate("ab", method=method, **settings, **draft)
            assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason)


def test_members_that_agree_need_one_forward_for_many_tokens():
    ensemble = make_ensemble([engine(seed=1), engine(seed=1)])
    counts, expected = drafted(ensemble, "m0", 8, seed=1, max_tokens=60, ignore_end=True)
    usage = counts.usage
    assert usage.accepted == usage.drafted > 15
    assert usage.members["m1"].forwards * 5 < expected.usage.members["m1"].forwards
    # Every block yields a symbol of the checking member that was not guessed.
    assert usage.members["m1"].tokens >= usage.drafted + usage.members["m1"].forwards - 1


@pytest.mark.slow
def test_large_forwards_a_token_are_as_the_formula_says():
    right, checks, weights = 0.8, 3, np.array([0.5, 0.5])
    table = engine(seed=1).table

    def sometimes(context):
        # The other member's distribution, but for a fifth of the contexts another one with no symbol in common with it.
        logits = table(context).copy()
        if np.random.default_rng([5, *context[-3:]]).random() > right:
            logits = np.roll(logits, 1)
        return logits

    ensemble = make_ensemble([engine(seed=1), engine(seed=1)])
    ensemble.members[1].engine.table = sometimes
    usages = [
        ensemble.generate(
            "ab", method="speculative", raw=True, draft="m0", block=checks, seed=s, max_tokens=400, ignore_end=True
        ).usage
        for s in range(3)
    ]
    beta = sum(usage.accepted for usage in usages) / sum(usage.drafted for usage in usages)
    ratio = sum(usage.members["m1"].forwards for usage in usages) / sum(usage.tokens for usage in usages)
    expected = (1 - weights[0]) * (1 - beta) / (1 - beta ** (checks + 1))
    assert 0.5 < beta < 0.95
    assert abs(ratio / expected - 1) < 0.1


def test_a_wrong_guess_is_never_kept():
    """A draft that guesses at random, certain of nothing: the text stays the mixture's."""

    class Random(LookupDraft):
        def propose(self, step):
            return int(np.random.default_rng(step.noise.position).integers(len(SHARED)))

    ensemble = toys("piece", 3)
    settings = ensemble.settings(raw=True, seed=9, max_tokens=60, ignore_end=True)
    prompts = ensemble.encode_prompt("ab", settings)
    expected = ensemble.context(settings).start(prompts).finish()
    writer, tally = ensemble.context(settings), SpeculationStats()
    writer = replace(writer, strategy=speculative(Random(), 4, tally))
    assert writer.start(prompts).finish().text == expected.text
    assert 0 < tally.accepted < tally.drafted


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_drafted_greedy_is_greedy(unit, draft, name):
    for members in (1, 2, 3):
        ensemble = toys(unit, members)
        if draft not in (*ensemble.names, "lookup"):
            continue
        for prompt in ("ab", "c a", "b"):
            options = {"raw": True, "seed": 0, "max_tokens": 40, "ignore_end": prompt != "b", **OPTIONS[name]}
            expected = ensemble.generate(prompt, method="greedy", **options)
            completion = ensemble.generate(prompt, method="greedy", draft=draft, block=3, **options)
            assert [token.data for token in completion.tokens] == [token.data for token in expected.tokens]


def test_drafted_greedy_runs_fewer_forwards_where_members_agree():
    ensemble = make_ensemble([engine(seed=1), engine(seed=1)])
    options = {"raw": True, "seed": 0, "max_tokens": 48, "ignore_end": True, "method": "greedy"}
    plain = ensemble.generate("ab", **options).usage.members["m1"].forwards
    usage = ensemble.generate("ab", **options, draft="m0", block=5).usage
    assert usage.accepted == usage.drafted
    assert usage.members["m1"].forwards == 8 < plain


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_auto_writes_the_mixtures_text(unit):
    for members in (1, 2, 4):
        ensemble = toys(unit, members)
        for sequence in range(5):
            texts, _ = same_text(ensemble, "auto", seed=8, sequence=sequence, max_tokens=80, ignore_end=True)
            assert texts.usage.chosen


def forwards(tokens, count=8):
    return [Forward(1, 10, tokens) for _ in range(count)]


def plan(seconds, agreement):
    logs, weights = [forwards(second) for second in seconds], np.array([0.5, 0.5])
    context = StrategyContext(weights, ["small", "large"], [{}] * 2, [1] * 2, lambda: logs)
    acceptance = {name: SpeculationStats(1000, int(1000 * agreement)) for name in ("small", "large")}
    return Auto(context, acceptance).plan(weights)


def test_auto_drafts_where_it_pays_and_with_the_cheap_member():
    draft, checks = plan((0.1, 1.0), 0.8)
    assert (draft.name, checks >= 2) == ("small", True)
    assert plan((1.0, 0.1), 0.8)[0].name == "large"
    assert plan((1.0, 1.0), 0.8)[0].name == "lookup"
    assert plan((0.1, 1.0), 0.02)[0].name == "lookup"
    # The surer the draft, the longer the block.
    assert plan((0.1, 1.0), 0.95)[1] > plan((0.1, 1.0), 0.5)[1]


def test_costs_come_from_forwards_and_from_sizes_before_any():
    logs = [[Forward(1, 5, 2.0)] * 5 + [Forward(5, 5, 2.8)] * 5 + [Forward(100, 0, 50.0)], []]
    estimator = ForwardCostEstimator(lambda: logs, [100, 50])
    costs = estimator.estimate()
    np.testing.assert_allclose(costs.seconds, [2.0, 1.0])
    np.testing.assert_allclose(costs.slopes, [0.1, 0.02])
    # What a further token costs holds also where forwards of one token have followed for long.
    logs[0] = [Forward(1, 5, 3.0)] * 100
    np.testing.assert_allclose(estimator.estimate().seconds, [3.0, 1.5])
    np.testing.assert_allclose(estimator.estimate().slopes, [0.1, 0.02])


def test_the_cost_of_a_token_by_hand():
    weights, costs = np.array([0.5, 0.5]), ForwardCosts(np.array([0.1, 1.0]), np.zeros(2))
    assert mixture_seconds(weights, costs) == pytest.approx(0.55)
    # Without checks a block is what the mixture does: the draft's run, then one forward of the other.
    assert speculative_seconds(weights, costs, DraftPlan(0, 0, 0.8)) == pytest.approx(0.55)
    # Four symbols of the large member a block when all are right, and the draft writes all but the last of eight.
    assert speculative_seconds(weights, costs, DraftPlan(0, 3, 1.0)) == pytest.approx((7 * 0.1 + 1) / 8)


def test_what_cannot_be_drafted_is_refused():
    ensemble = toys("token", 2)
    with pytest.raises(ConfigError, match="draft is 'm9'; it must be one of m0, m1, lookup"):
        ensemble.generate("ab", method="speculative", draft="m9")
    with pytest.raises(ConfigError, match="mixture does not draft"):
        ensemble.generate("ab", method="mixture", draft="m0")
    with pytest.raises(ConfigError, match="block is 0"):
        ensemble.generate("ab", method="speculative", block=0)
    with pytest.raises(UnsupportedError, match="temperature is 0"):
        ensemble.generate("ab", method="speculative", temperature=0)


@pytest.mark.slow
@given(st.lists(st.integers(0, 3), max_size=30))
@settings(max_examples=200)
def test_what_followed_before_is_found(ids):
    draft = lookup_continuation(np.array(ids, dtype=np.int64))
    for length in (4, 3, 2):
        places = [i for i in range(len(ids) - length) if ids[i : i + length] == ids[len(ids) - length :]]
        if places:
            assert draft == ids[places[-1] + length]
            return
    assert draft is None


def test_texts_that_extend_each_other_are_read_at_once():
    texts = [[1], [1, 2], [1, 2], [1, 3, 4], [1, 3, 4, 5], [1, 3]]
    mask = np.ones(9, dtype=bool)
    requests = {key: LogitsRequest(7, np.array(ids), allowed=(mask if key else None,)) for key, ids in enumerate(texts)}
    joined = join_requests(requests)
    assert [rows for _, rows in joined] == [{0: 0, 1: 1, 2: 1}, {3: 0, 4: 1}, {5: 0}]
    assert [(request.member, request.ids.tolist(), request.last) for request, _ in joined] == [
        (7, [1, 2], 2),
        (7, [1, 3, 4, 5], 2),
        (7, [1, 3], 1),
    ]
    assert joined[0][0].allowed == [None, mask]
    gap = join_requests({0: requests[0], 1: LogitsRequest(7, np.array([1, 2, 3]), allowed=(mask,))})
    assert gap[0][0].allowed == [None, None, mask]
