"""Agreement by construction: drafts are right as often as asked, and forwards are run all the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tiny import shapes
from toys import toys

from mixlm.binding import LoadedMember
from mixlm.core.options import Options
from mixlm.engines.base import total_weight_bytes
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from research.benchmark import ComparisonPlan, compare
from research.benchmark.agreement import AgreementDistribution, AgreementEngine, agreement_note, with_agreement


def pair(weights: Sequence[float] = (1, 1)) -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)], weights)


def agreed_distribution(share: float) -> AgreementDistribution:
    return AgreementDistribution([ToyEngine().vocabulary, ToyEngine().vocabulary], share)


def contexts(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 200, size=(count, 6)))


@pytest.mark.slow
def test_members_share_a_distribution_in_that_share_of_contexts_and_no_token_in_the_others() -> None:
    agreement, equal = agreed_distribution(0.8), 0
    for ids in contexts(2000):
        first, second = agreement(0, ids), agreement(1, ids)
        same = bool((first == second).all())
        assert same == agreement.agrees(ids)
        assert same or not (np.isfinite(first) & np.isfinite(second)).any()
        assert np.isfinite(first).sum() >= 100
        equal += same
    assert abs(equal / 2000 - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 2000)


def test_the_distribution_is_a_function_of_the_last_three_tokens() -> None:
    agreement = agreed_distribution(0.5)
    for ids in contexts(20):
        np.testing.assert_array_equal(agreement(0, ids), agreed_distribution(0.5)(0, ids[-3:]))
    first, second = contexts(2)
    assert (agreement(0, first) != agreement(0, second)).any()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_guesses_are_right_as_often_as_members_agree(share: float) -> None:
    plan = ComparisonPlan(300, 2, methods=["speculative"], agreement=share)
    report = compare(pair(), plan, options={"draft": "toy-1"})
    [run] = report.runs
    assert run.acceptance is not None
    assert abs(run.acceptance - share) <= 4 * np.sqrt(share * (1 - share) / run.drafted)
    assert report.notes == (agreement_note(share),)
    assert report.environment["settings"]["agreement"] == share
    assert all(agreement_note(share) in details["agreement"] for details in report.environment["engines"].values())


def test_the_text_of_speculative_is_that_of_mixture() -> None:
    ensemble = with_agreement(pair([1, 3]), 0.7)
    options: Options = {"seed": 5, "max_tokens": 60, "ignore_end": True}
    expected = ensemble.generate("the river", **options)
    completion = ensemble.generate("the river", **options, method="speculative", draft="toy-1")
    assert completion.text == expected.text
    conventional = ensemble.generate("the river", **options, method="conventional")
    assert {token.member for token in conventional.tokens} == {"toy-1", "toy-2"}


@pytest.mark.slow
def test_forwards_are_run_by_the_models_themselves() -> None:
    ensemble = with_agreement(shapes(), 1.0)
    engine = ensemble.members[0].engine
    assert isinstance(engine, AgreementEngine)
    [run] = compare(shapes(), ComparisonPlan(10, 1, methods=["conventional"], agreement=1.0)).runs
    assert run.forwards == {"small": 10, "large": 10}
    assert all(seconds > 0 for by in run.seconds_by_forward_length.values() for seconds in by.values())
    assert agreement_note(1.0) in engine.notes
    assert engine.inner.notes[0] in engine.notes


def test_one_model_twice_is_run_for_each_member() -> None:
    engine = ToyEngine(seed=1)
    ensemble = with_agreement(Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")]), 0.5)
    assert ensemble.members[0].engine is not ensemble.members[1].engine
    engine.weights_bytes = 7
    assert total_weight_bytes([member.engine for member in ensemble.members]) == 7  # and held once


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"agreement is 1\.2; it must be from 0 to 1"):
        with_agreement(pair(), 1.2)
    with pytest.raises(UnsupportedError, match="needs the unit token"):
        with_agreement(toys("piece", 2), 0.8)
    toy = ToyEngine([b"a"])
    tiny = Ensemble([LoadedMember(toy, "a"), LoadedMember(toy, "b")])
    with pytest.raises(UnsupportedError, match="share 1 tokens, too few"):
        with_agreement(tiny, 0.8)
