"""The strength of a rule, fitted: against the log-probabilities of `scoring`, one strength at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scored_texts import rule_logprob
from toys import toys

from mixlm.core.options import GenerationOptions
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.rule_strength import fit_strength
from mixlm.scoring.rule_scores import text_passages

TEXT = "ab cb ab c ab ba b" * 2


def with_rule(rule: str, weights: list[float] | None = None, unit: str = "token", **options: Any) -> Ensemble:
    members = toys(unit, 2).members
    defaults = GenerationOptions(method="layered", rule=rule, **options)
    return Ensemble(members, weights or [0.6, 0.4], unit=unit, defaults=defaults)


def bits(ensemble: Ensemble, text: str = TEXT) -> float:
    return -rule_logprob(ensemble, text_passages(ensemble, [text])) / math.log(2) / len(text)


@pytest.mark.parametrize(
    ("rule", "options"), [("power", {}), ("contrastive", {"alpha": 0.0}), ("guidance", {}), ("defer", {"by": "token"})]
)
def test_no_strength_that_was_tried_makes_the_text_more_likely(rule, options):
    ensemble = with_rule(rule, **options)
    fit = fit_strength(ensemble, text_passages(ensemble, [TEXT]), fit_weights=False)
    assert fit.weights.tolist() == [0.6, 0.4]
    assert [strength for strength, _ in fit.strengths] == sorted(strength for strength, _ in fit.strengths)
    for strength, value in fit.strengths[::4]:
        assert value == pytest.approx(bits(with_rule(rule, strength=strength, **options)))
        assert fit.train <= value
    assert fit.train == pytest.approx(bits(with_rule(rule, strength=fit.strength, **options)))
    assert fit.check is None


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_weights_are_fitted_too_and_the_rest_of_the_text_judges(unit):
    ensemble = with_rule("geometric", unit=unit)
    train, check = (text_passages(ensemble, [text]) for text in ("ab c ab", " ba cb"))
    fit = fit_strength(ensemble, train, check)
    fixed = fit_strength(ensemble, train, check, fit_weights=False)
    assert fit.train <= fixed.train + 1e-9
    best = with_rule("geometric", fit.weights.tolist(), unit, strength=fit.strength)
    assert fit.train == pytest.approx(bits(best, "ab c ab"))
    assert fit.check == pytest.approx(bits(best, " ba cb"))
    assert fit.average == pytest.approx(bits(with_rule("average", unit=unit), " ba cb"))
    assert np.isclose(fit.weights.sum(), 1)


def test_the_last_strength_that_was_tried_is_called_so():
    ensemble = with_rule("guidance")
    fits = [fit_strength(ensemble, text_passages(ensemble, [text])) for text in ("a", "b", "c")]
    assert [(fit.strength, fit.at_edge) for fit in fits] == [(0.0, False), (0.4, False), (3.0, True)]


def test_what_cannot_be_fitted_says_so():
    ensemble = with_rule("max")
    with pytest.raises(UnsupportedError, match="rule max has no strength to fit"):
        fit_strength(ensemble, text_passages(ensemble, [TEXT]))
    ensemble = with_rule("contrastive", alpha=1.0)
    with pytest.raises(ConfigError, match=r"gives some token of the text no probability at any strength.*alpha"):
        fit_strength(ensemble, text_passages(ensemble, [TEXT]))
    with pytest.raises(ConfigError, match="there is no text"):
        fit_strength(with_rule("power"), [])
