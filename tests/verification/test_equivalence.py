"""`check` passes on every strategy, unit and option, and fails when a sampler is broken.

The distributions themselves are compared exactly where the strategies are tested; here it is `check` that is. With 400
completions, the members' weights swapped for the first or for the second symbol (a total variation of 0.18 and 0.2) are
found with probability 0.999, a coin that is always the most likely symbol too; with 200, the second is with 0.996.
Samplers that must pass are checked on the toys of `toys`, whose small vocabularies take less time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import OPTIONS, assert_same_distribution, engine, exact_distribution, fixed, named, toys
from toys import make_ensemble as ensemble_of

from mixlm.binding import LoadedMember
from mixlm.choices import Method
from mixlm.core.options import GenerationOptions
from mixlm.decoding.mixture import mixture
from mixlm.engines.requests import LogitsRequest, SampleRequest
from mixlm.engines.toy import ToyEngine, random_table
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.sequence import Choice, DecodeStep, Flow
from mixlm.units.byte import ByteState
from mixlm.units.token import TokenUnit
from mixlm.verification.check import CheckReport, ReferenceSetup, check, check_units
from mixlm.verification.exact import ExactReference

SAMPLES = 400
RAW: Any = {"raw": True}
LETTERS = [b"a", b"b", b"c", b"ab", b" a", b"\n", b"bc", b"hello", b"user: ", b" "]


def make_ensemble(members: int, unit: str) -> Ensemble:
    """Members of one vocabulary for `token`; otherwise each with an order and extra tokens of its own."""
    specs = []
    for i in range(members):
        tokens = [bytes([b]) for b in range(256)] + LETTERS[3:]
        if unit != "token":
            tokens = tokens[i:] + tokens[:i] + [b"x" * (i + 2), b"a"]
        size = len(tokens) + 2
        bias = np.full(size, -9.0)
        bias[[tokens.index(letter) for letter in LETTERS]] = 0
        bias[[size - 1, size - 3]] = 0
        table = random_table(size, seed=i)
        engine = ToyEngine(tokens, lambda context, t=table, b=bias: t(context) + b, name=f"toy-{i}")
        specs.append(LoadedMember(engine, engine.name))
    return Ensemble(specs, [1 + i for i in range(members)], unit=unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_reference_is_the_average_of_the_members_distributions(unit: str, name: str) -> None:
    """With every sampling option, exactly: a plain sum over the toys' tables has no part in common with it."""
    ensemble = toys(unit, 3)
    settings = ensemble.settings(raw=True, seed=0, **OPTIONS[name])
    reference = ExactReference(ensemble, settings, ensemble.encode_prompt("ab", settings))
    symbols = {ensemble.unit.symbol_bytes(symbol): symbol for symbol in range(ensemble.unit.end)}
    for pieces in ((), (b"a",), (b"ab", b" c", b"ab")):
        distribution = reference.distribution([symbols[piece] for piece in pieces])
        actual = named(ensemble, np.arange(distribution.size), distribution)
        assert_same_distribution(actual, exact_distribution(ensemble, OPTIONS[name], "ab", pieces))


@pytest.mark.slow
@pytest.mark.parametrize(("members", "unit"), [(2, "token"), (5, "piece")])
def test_all_strategies_follow_the_exact_distribution(members: int, unit: str) -> None:
    report = check(toys(unit, members), "cab", samples=SAMPLES, options=RAW)
    assert report.equal, report
    assert {(comparison.left, comparison.right) for comparison in report.comparisons} == {
        ("mixture", "exact"),
        ("conventional", "exact"),
        ("single", "exact"),
        ("speculative", "exact"),
        ("layered", "exact"),
        ("greedy", "exact"),
        ("mixture", "conventional"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_k": 0}, {"top_k": 3, "presence_penalty": 2.0}])
@pytest.mark.parametrize("unit", ["word", "byte"])
def test_words_and_bytes_follow_their_distributions(unit: str, options: dict[str, Any]) -> None:
    ensemble = toys("piece", 3).with_unit(unit)  # type: ignore[arg-type]
    report = check(ensemble, "cab", samples=SAMPLES, options=RAW | options)
    assert report.equal, report
    assert {comparison.left for comparison in report.comparisons} == {"mixture", "single"}


@pytest.mark.slow
def test_a_token_that_is_not_read_back_from_its_bytes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of bytes is not that of the bytes behind a boundary."""
    monkeypatch.setattr(ByteState, "forced_boundary", lambda self, member: len(self))
    report = check(make_ensemble(2, "byte"), "hello", samples=SAMPLES)
    wrong = {(comparison.left, comparison.position) for comparison in report.comparisons if not comparison.equal}
    assert wrong == {("mixture", 2), ("single", 2)}


@pytest.mark.slow
def test_a_word_that_another_member_goes_on_with_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlm.decoding.word_mixture.build", lambda options, context: mixture)
    report = check(make_ensemble(3, "word"), "hello", samples=SAMPLES)
    wrong = {(comparison.left, comparison.position) for comparison in report.comparisons if not comparison.equal}
    assert wrong == {("mixture", 2)}


@pytest.mark.slow
def test_every_unit_is_checked_that_members_have() -> None:
    report, left_out = check_units(make_ensemble(2, "token"), "hello", samples=100)
    assert report.equal
    assert left_out == {}
    assert list(dict.fromkeys(comparison.unit for comparison in report.comparisons)) == [
        "token",
        "piece",
        "word",
        "byte",
    ]
    report, left_out = check_units(toys("piece", 2), "ab", samples=100, options=RAW)
    assert list(left_out) == ["token"]
    assert "share no vocabulary" in left_out["token"]
    assert {comparison.unit for comparison in report.comparisons} == {"piece", "word", "byte"}


def test_a_method_that_the_unit_has_no_distribution_for_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="conventional does not work with the unit word"):
        check(make_ensemble(2, "word"), "hello", samples=200, options={"method": "conventional", "rule": "gac"})


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_all_sampling_options_together_keep_the_distribution(unit: str) -> None:
    assert check(toys(unit, 2), "ab c b", samples=SAMPLES, options=RAW | OPTIONS["all"]).equal


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ignore_end": True}, {"min_tokens": 1}, {"min_tokens": 5, "rule": "max"}])
def test_where_a_text_may_not_end_the_distribution_has_no_end(options: dict[str, Any]) -> None:
    ending = fixed({b"a": 0.3, b"b": 0.2, b"": 0.5})
    ensemble = ensemble_of([ending, engine(seed=3)])
    assert check(ensemble, "ab", samples=200, options={"raw": True, **options}).equal  # type: ignore[arg-type]


@pytest.mark.slow
def test_members_with_sampling_of_their_own_keep_the_distribution() -> None:
    ensemble = toys("token", 2, sampling=[{"temperature": 0.4}, {"top_k": 3}])
    assert check(ensemble, "cab", samples=SAMPLES, options=RAW).equal


@pytest.mark.slow
def test_mix_then_truncate_follows_its_own_distribution() -> None:
    options = RAW | {"mix_then_truncate": True, "top_k": 3}
    report = check(toys("token", 2), "cab", samples=SAMPLES, options=options)
    assert report.equal
    assert {comparison.left for comparison in report.comparisons} == {"conventional", "layered", "greedy"}


def test_the_mode_of_a_union_is_that_of_its_own_k() -> None:
    """c is in nobody's top 1, and more likely on average than the two that are."""
    tokens = (b"a", b"b", b"c", b"d")
    first = fixed({b"a": 0.38, b"b": 0.01, b"c": 0.36, b"d": 0.25}, tokens)
    second = fixed({b"a": 0.01, b"b": 0.37, b"c": 0.36, b"d": 0.26}, tokens)
    ensemble = ensemble_of([first, second])
    modes = {}
    for top_k in (1, 4):
        settings = ensemble.settings(raw=True, rule="union-top-k", method="greedy", top_k=top_k, temperature=1.0)
        exact = ExactReference(ensemble, settings, ensemble.encode_prompt("a", settings))
        modes[top_k] = ensemble.unit.symbol_bytes(int(np.argmax(exact.first)))
        text = ensemble.generate("a", raw=True, rule="union-top-k", method="greedy", top_k=top_k, max_tokens=1).text
        assert text.encode() == modes[top_k]
    assert modes == {1: b"a", 4: b"c"}


def broken_coin(step: DecodeStep) -> Flow:
    """Draw the coin from wrong weights."""
    z = step.noise.coin(step.weights[::-1])
    view = step.views[z]
    [sampled] = yield [SampleRequest(z, view.ids(), view.sampler(step.noise))]
    return [Choice(sampled.symbol, z, sampled.logprob)]


def most_confident(step: DecodeStep) -> Flow:
    """Let the member that is surest write: weights that look at current distributions."""
    completions = yield [LogitsRequest(i, view.ids()) for i, view in enumerate(step.views)]
    distributions = [view.distribution(logits[0]) for view, logits in zip(step.views, completions, strict=True)]
    z = int(np.argmax([distribution.logprobs.max() for distribution in distributions]))
    index = step.noise.sample(*distributions[z])
    return [Choice(int(distributions[z].ids[index]), z, float(distributions[z].logprobs[index]))]


def coin_is_the_noise(step: DecodeStep) -> Flow:
    """Let the coin tell what is sampled: with coin 0 always the member's most likely symbol."""
    z = step.noise.coin(step.weights)
    [logits] = yield [LogitsRequest(z, step.views[z].ids())]
    symbols, logprobs = step.views[z].distribution(logits[0])
    index = int(np.argmax(logprobs)) if z == 0 else step.noise.sample(symbols, logprobs)
    return [Choice(int(symbols[index]), z, float(logprobs[index]))]


def only(monkeypatch: pytest.MonkeyPatch, *methods: Method) -> None:
    """Let `check` sample some methods alone: what is wrong with one is found without the others."""
    monkeypatch.setattr(TokenUnit, "traits", replace(TokenUnit.traits, methods=methods))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [broken_coin, most_confident, coin_is_the_noise])
def test_a_broken_sampler_is_found(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr("mixlm.decoding.mixture.build", lambda options, context: broken)
    if broken is not broken_coin:
        only(monkeypatch, "mixture")
    report = check(make_ensemble(2, "token"), "hello", samples=SAMPLES)
    assert not report.equal
    assert all(
        comparison.equal for comparison in report.comparisons if "mixture" not in (comparison.left, comparison.right)
    )


@pytest.mark.slow
def test_a_member_that_reads_a_stale_text_is_found_at_the_second_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(step: DecodeStep) -> Flow:
        z = step.noise.coin(step.weights)
        view = step.views[z]
        ids = view.ids()
        [sampled] = yield [
            SampleRequest(z, ids[:-1] if z == 1 and step.noise.position else ids, view.sampler(step.noise))
        ]
        return [Choice(sampled.symbol, z, sampled.logprob)]

    monkeypatch.setattr("mixlm.decoding.mixture.build", lambda options, context: stale)
    only(monkeypatch, "mixture")
    report = check(make_ensemble(2, "token"), "hello", samples=SAMPLES)
    wrong = {(comparison.left, comparison.position) for comparison in report.comparisons if not comparison.equal}
    assert wrong == {("mixture", 2)}


@pytest.mark.slow
def test_broken_greedy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_member_only(step: DecodeStep) -> Flow:
        [logits] = yield [LogitsRequest(0, step.views[0].ids())]
        distribution = step.views[0].distribution(logits[0])
        index = int(np.argmax(distribution.logprobs))
        return [Choice(int(distribution.ids[index]), 0, float(distribution.logprobs[index]))]

    monkeypatch.setattr("mixlm.decoding.greedy.build", lambda options, context: first_member_only)
    only(monkeypatch, "mixture", "greedy")
    assert not check(make_ensemble(3, "token"), "hello", samples=100).equal


@pytest.mark.slow
def test_drafts_that_are_accepted_unverified_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unverified(positions: list[Any], stats: Any) -> Any:
        yield from ()
        drafts = [position for position in positions if position.proposal is not None]
        return [Choice(position.proposal, position.members[0], 0.0) for position in drafts]

    monkeypatch.setattr("mixlm.decoding.blocks.verify", unverified)
    only(monkeypatch, "mixture", "speculative")
    report = check(make_ensemble(2, "token"), "hello", samples=SAMPLES)
    assert {comparison.left for comparison in report.comparisons if not comparison.equal} == {"speculative"}


@pytest.mark.slow
def test_json_form() -> None:
    report = check(toys("token", 2), "cab", samples=200, options=RAW)
    form = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert form["equal"] is True
    assert set(form["comparisons"][0]) >= {
        "left", "right", "unit", "samples", "statistic", "p_value", "total_variation", "expected_total_variation",
        "equal",
    }  # fmt: skip


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="samples is 5"):
        check(make_ensemble(2, "token"), "hello", samples=5)


# Few tokens of each member are sampled behind a short prompt, so that few forwards compute the exact distribution.
FEW: Any = RAW | {"top_k": 4}


@pytest.mark.models
def test_the_real_pair_follows_the_exact_distribution(demo_pair: Ensemble) -> None:
    report = check(demo_pair, "The sky is", samples=200, options=FEW)
    assert isinstance(report, CheckReport)
    assert report.equal, report


@pytest.mark.models
@pytest.mark.parametrize("unit", ["word", "byte"])
def test_the_real_pair_follows_the_distributions_of_words_and_bytes(demo_pair: Ensemble, unit: Any) -> None:
    ensemble = Ensemble(demo_pair.members, unit=unit)
    report = check(ensemble, "The sky is", samples=100, options=FEW)
    assert report.equal, report


@pytest.mark.models
def test_real_members_that_share_a_vocabulary_follow_the_exact_distribution(demo_pair: Ensemble) -> None:
    first = demo_pair.members[0]
    terse = LoadedMember(first.engine, "other temperature", {"temperature": 0.3})
    shared = Ensemble([first, terse], [0.6, 0.4], defaults=GenerationOptions())
    assert shared.unit.name == "token"
    assert check(shared, "Name a colour.", samples=200, options=FEW).equal


def drawing_pair(seed: int = 10, **options) -> Ensemble:
    engines = [engine(seed=seed + i, **options) for i in range(2)]
    return Ensemble([LoadedMember(engine, f"m{i}") for i, engine in enumerate(engines)], [0.6, 0.4])


@pytest.mark.slow
def test_engines_that_sample_themselves_are_checked_against_those_of_a_reference():
    report = check(
        drawing_pair(samples_itself=True), "ab", samples=800, options=RAW, reference=ReferenceSetup(drawing_pair())
    )
    assert report.equal
    assert {comparison.left for comparison in report.comparisons} >= {"mixture", "conventional", "single"}


@pytest.mark.slow
def test_another_distribution_than_the_references_is_found_unless_it_is_within_the_tolerance(monkeypatch):
    only(monkeypatch, "mixture")
    first, other = drawing_pair(samples_itself=True), drawing_pair(seed=12)
    assert not check(first, "ab", samples=400, options=RAW, reference=ReferenceSetup(other)).equal
    assert not check(first, "ab", samples=400, options=RAW, reference=ReferenceSetup(other, 0.05)).equal
    generous = check(first, "ab", samples=400, options=RAW, reference=ReferenceSetup(other, 0.9)).comparisons
    assert all(generou.equal for generou in generous if generou.right == "exact")


def test_a_reference_that_reads_otherwise_is_refused():
    with pytest.raises(ConfigError, match="do not read as m0, m1 do"):
        check(drawing_pair(), "ab", samples=100, options=RAW, reference=ReferenceSetup(toys("piece", 2)))
    with pytest.raises(ConfigError, match="tolerance is 1; it must be 0 or more and less than 1"):
        ReferenceSetup(drawing_pair(), 1.0)
