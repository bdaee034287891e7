"""Gates of rule defer: their gradient, what they learn, their files, and that scores and rule agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_texts import made, speaking
from toys import ReportingToy, make_ensemble

from mixlm.core.combinations.defer import Defer
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting import gate_trainer
from mixlm.fitting.deferral import DeferralScores, train_deferral
from mixlm.fitting.gate_trainer import gradients
from mixlm.fitting.gates import untrained
from mixlm.routing.base import TOP_K, Observes
from mixlm.routing.deferral import FEATURES, DeferralGate, deferral_features
from mixlm.routing.gate import Gate
from mixlm.routing.gate_router import GateInputs
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.member_scores import passage_states
from mixlm.scoring.rule_scores import RuleScorer, text_passages
from mixlm.scoring.score import score
from mixlm.scoring.scores import Scores


@pytest.fixture(autouse=True)
def one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trials than a user's."""
    monkeypatch.setattr(gate_trainer, "PENALTIES", (5e-3,))
    monkeypatch.setattr(gate_trainer, "DECAYS", (0.0,))


def random_gate(width: int = 0, seed: int = 0) -> Gate:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> Any:
        return (rng.normal(size=shape) / 2).astype(np.float32)

    arrays = {name: array(*shape) for name, shape in Gate.shapes(2, FEATURES, width).items()}
    return replace(Gate(**arrays), centre=np.zeros_like(arrays["centre"]), scale=np.ones_like(arrays["scale"]))


def scores(tokens: int = 300, seed: int = 0) -> Scores:
    """Scores in which the first member is right where it is sure, and wrong where it is not."""
    rng = np.random.default_rng(seed)
    sure = rng.random(tokens) < 0.5
    logits = np.sort(rng.normal(scale=np.where(sure, 5.0, 0.5)[:, None], size=(tokens, TOP_K)))[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    place = np.where(sure, 0, rng.integers(TOP_K, size=tokens))
    own = logprobs[np.arange(tokens), place] + np.log(0.9)
    table = np.column_stack([own, np.where(sure, np.log(0.3), np.log(0.5))])
    ids = np.tile(np.arange(TOP_K), (tokens, 1))
    return replace(made(table), observed=ObservedStates("m0", ids, logprobs, None, np.full(tokens, 0.9), place))


@pytest.mark.parametrize("width", [0, 3])
def test_the_gradient_is_that_of_the_loss(width: int) -> None:
    data, price = DeferralScores.of(scores(12)), 0.4
    data = replace(data, place=np.where(np.arange(12) % 5 == 0, -1, data.place))
    objective, gate = data.objective(price), random_gate(width)
    loss, slopes = gradients(gate, objective.inputs, objective.loss)
    keeps = DeferralGate(gate, ["m0", "m1"])
    top = data.logprobs.max(axis=1)
    assert loss == pytest.approx((price * (1 - data.kept(keeps)) - data.deferred(keeps) + top).mean(), abs=1e-5)
    for name, slope in slopes.items():
        array = getattr(gate, name)
        for index in list(np.ndindex(array.shape))[::5]:
            step = np.zeros_like(array)
            step[index] = 3e-3
            changed = [replace(gate, **{name: array + sign * step}) for sign in (1, -1)]
            ends = [gradients(one, objective.inputs, objective.loss)[0] for one in changed]
            assert slope[index] == pytest.approx((ends[0] - ends[1]) / 6e-3, abs=5e-3)


def test_the_place_of_a_token_is_that_of_its_id_among_equally_likely_ones() -> None:
    even = scores(2)
    assert even.observed is not None
    states = replace(even.observed, logprobs=np.full((2, TOP_K), -np.log(TOP_K)), following=np.array([7, TOP_K]))
    table = np.full((2, 2), -np.log(TOP_K) + np.log(0.9))
    assert DeferralScores.of(replace(even, observed=states, logprobs=table)).place.tolist() == [7, -1]


def test_a_gate_keeps_what_the_first_member_is_sure_of() -> None:
    data = DeferralScores.of(scores(300, 1))
    gate = train_deferral([scores()])
    _, kept_by_top = data.by_top(0.5)
    assert 0.3 < kept_by_top < 0.7
    bits = -data.deferred(gate).mean()
    assert bits < -data.logprobs.mean(axis=0).max() - 0.2
    dear = train_deferral([scores()], price=1.0)
    assert data.kept(dear).mean() > data.kept(gate).mean() + 0.05


def test_scores_and_the_rule_agree_and_the_file_keeps_the_gate(tmp_path: Path) -> None:
    ensemble = make_ensemble([speaking(1), speaking(2)], unit="token")
    text = "abc ab cab a bc ba"
    watching = ensemble.with_router(untrained(ensemble.names, GateInputs(("top_k",), ensemble.names[0], TOP_K)))
    data = DeferralScores.of(score(watching, text))
    DeferralGate(random_gate(3), ensemble.names).save(tmp_path / "keep.json")
    gate = DeferralGate.load(tmp_path / "keep.json")
    expected = RuleScorer(ensemble, [(Defer(accept=gate), ensemble.weights)]).logprobs(text_passages(ensemble, [text]))
    assert data.deferred(gate).sum() == pytest.approx(float(expected[0]), abs=1e-4)
    assert 0.05 < data.kept(gate).mean() < 0.95
    assert DeferralGate(random_gate(3, seed=1), ensemble.names).digest != gate.digest == gate.gate.digest
    (tmp_path / "keep.json").write_text('{"kind": "gate"}')
    with pytest.raises(ConfigError, match="is not a gate of rule defer: its kind is 'gate'"):
        DeferralGate.load(tmp_path / "keep.json")


def test_of_an_engine_that_reports_likely_tokens_alone_their_probability_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normalized: list[int] = []
    of_rows = Session.log_normalizers
    monkeypatch.setattr(
        Session, "log_normalizers", lambda self, rows: normalized.append(len(rows)) or of_rows(self, rows)
    )
    reporting = ReportingToy(speaking(1), 10)
    ids = np.array(reporting.prompts.raw("abc ab cab"))
    observes = Observes(0, 10)
    known, unknown = (passage_states(engine.session(), observes, ids, 1, "m0") for engine in (reporting.toy, reporting))
    np.testing.assert_allclose(unknown.logprobs, known.logprobs, atol=1e-6)
    assert known.mass is not None
    assert unknown.mass is None
    assert normalized == [1] * len(known)  # one row at a time, and none of a report
    assert passage_states(reporting.toy.session(), Observes(0, 0, hidden=True), ids, 1, "m0").mass is None


def test_a_is_of_the_likeliest_tokens_in_any_order() -> None:
    rng = np.random.default_rng(0)
    gate = DeferralGate(random_gate(), ["a", "b"])
    distribution = rng.dirichlet(np.full(50, 0.3))
    a = gate(distribution)
    assert (a > 0).sum() == TOP_K
    assert distribution[a > 0].min() > distribution[a == 0].max()
    order = rng.permutation(50)
    np.testing.assert_allclose(gate(distribution[order]), a[order])
    few = gate(np.array([0.0, 0.7, 0.3]))
    assert few[0] == 0
    assert (few[1:] > 0).all()
    assert np.isfinite(deferral_features(np.log(np.array([[1.0, *[0.0] * 19]]) + 1e-300))).all()


def test_what_a_gate_cannot_be_trained_on_is_named() -> None:
    with pytest.raises(ConfigError, match="there are 3 of them"):
        train_deferral([made(np.zeros((9, 3)))])
    with pytest.raises(ConfigError, match="hold no likely tokens of m0"):
        train_deferral([made(np.zeros((9, 2)))])
    with pytest.raises(UnsupportedError, match="members with one vocabulary"):
        train_deferral([replace(scores(20), unit="segment")])
