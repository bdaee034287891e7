"""Logits processors of members: part of `A_i`, so every method samples the exact distribution with them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import SHARED

from mixlm.binding import LoadedMember
from mixlm.core.logits_processor import as_processor, process_logits
from mixlm.core.sampling import softmax
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.dispatch import drive
from mixlm.verification.exact import ExactReference


def seesaw(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Depends on the tokens so far and on every logit's place."""
    return logits * 0.5 + 3 * np.sin(np.arange(len(logits)) + ids.sum() + len(ids))


@pytest.fixture
def pair() -> Ensemble:
    engines = [ToyEngine(SHARED, seed=seed, name=name) for seed, name in ((1, "first"), (2, "second"))]
    return Ensemble([LoadedMember(engine, engine.name) for engine in engines], [0.6, 0.4])


def distance(ensemble: Ensemble, reference: np.ndarray, samples: int) -> float:
    """The total variation between the bytes of sampled first symbols and those of a distribution over symbols."""
    difference: defaultdict[bytes, float] = defaultdict(float)
    for symbol, probability in enumerate(reference):
        difference[ensemble.unit.symbol_bytes(symbol) if symbol < ensemble.unit.end else b""] += probability
    for completion in ensemble.generate(["ab"] * samples, raw=True, max_tokens=1, seed=7):
        difference[completion.tokens[0].data if completion.tokens else b""] -= 1 / samples
    return sum(map(abs, difference.values())) / 2


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 3, "repetition_penalty": 1.5}], ids=str)
def test_the_distribution_is_that_of_the_reference(pair, options):
    processed = pair.with_logits_processors({"first": seesaw})
    settings = processed.settings(raw=True, **options)
    expected = ExactReference(processed, settings, processed.encode_prompt("ab", settings)).first
    distribution = processed.distribution("ab", raw=True, **options)
    probs = np.zeros(len(expected))
    probs[distribution.symbols] = distribution.probs
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    plain = pair.distribution("ab", raw=True, **options)
    changed = dict(zip(distribution.symbol_bytes, distribution.members[0], strict=True))
    before = dict(zip(plain.symbol_bytes, plain.members[0], strict=True))
    assert max(abs(changed.get(unit, 0) - before.get(unit, 0)) for unit in {*changed, *before}) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "word", "byte"])
def test_what_is_sampled_is_that_of_the_reference(pair, unit):
    processed = pair.with_unit(unit).with_logits_processors({"first": seesaw, "second": None})
    settings = processed.settings(raw=True)
    prompt = processed.encode_prompt("ab", settings)
    assert distance(processed, ExactReference(processed, settings, prompt).first, 300) < 0.11
    assert distance(processed, ExactReference(pair.with_unit(unit), settings, prompt).first, 300) > 0.15


def test_methods_agree_token_for_token(pair):
    processed = pair.with_logits_processors({"first": seesaw})
    texts = [
        [
            completion.text
            for completion in processed.generate(["ab", "c"] * 4, raw=True, method=method, max_tokens=12, seed=4)
        ]
        for method in ("mixture", "speculative")
    ]
    assert texts[0] == texts[1]


def test_a_processor_sees_its_own_member_alone(pair):
    seen = []

    def look(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), logits.shape))
        ids[:] = 0
        logits[:] = 0  # copies
        return np.arange(len(logits), dtype=np.float32)

    processed = pair.with_logits_processors({"second": look})
    distribution = processed.distribution("ab", raw=True)
    assert seen == [(pair.encode_prompt("ab", pair.settings(raw=True)).ids[1].tolist(), (len(SHARED) + 2,))]
    plain = pair.distribution("ab", raw=True)
    first = [dict(zip(d.symbol_bytes, d.members[0], strict=True)) for d in (distribution, plain)]
    assert {unit: prob for unit, prob in first[0].items() if prob} == {u: p for u, p in first[1].items() if p}


def test_one_of_transformers_is_taken_as_it_is(pair):
    transformers = pytest.importorskip("transformers")
    ids, logits = np.array([1, 2, 3]), np.linspace(-1, 1, 6, dtype=np.float32)
    processor = transformers.RepetitionPenaltyLogitsProcessor(2.0)
    expected = np.where(np.isin(np.arange(6), ids), np.where(logits > 0, logits / 2, logits * 2), logits)
    np.testing.assert_allclose(process_logits(as_processor(processor), ids, logits), expected)
    several = transformers.LogitsProcessorList([processor, processor])
    assert (
        pair.with_logits_processors({"first": several}).generate("ab", raw=True, max_tokens=3, seed=1).tokens
        is not None
    )


def test_masked_logits_stay_masked():
    logits = np.array([1, -np.inf, 2], dtype=np.float32)
    np.testing.assert_array_equal(process_logits(lambda ids, x: np.zeros(3), np.array([1]), logits), [0, -np.inf, 0])


@pytest.mark.parametrize(
    ("result", "problem"),
    [(np.zeros(3), r"float64\(3,\)"), (np.full(8, np.nan), "nan"), (np.full(8, np.inf), "inf"), (None, r"object\(\)")],
)
def test_what_is_no_logits_is_refused(pair, result, problem):
    processed = pair.with_logits_processors({"first": lambda ids, logits: result})
    with pytest.raises(ConfigError, match=rf"returned {problem} for logits of the shape \(8,\)"):
        processed.generate("ab", raw=True, method="conventional", max_tokens=1)


def test_unknown_members_and_what_cannot_be_called_are_refused(pair):
    with pytest.raises(ConfigError, match=r"there is no member 'third' .*first, second"):
        pair.with_logits_processors({"third": seesaw})
    with pytest.raises(ConfigError, match="the logits processor is 3; it must be a function"):
        pair.with_logits_processors({"first": 3})
    with pytest.raises(ConfigError, match=r"the logits processor cannot be called with \(ids, logits\)"):
        pair.with_logits_processors({"first": lambda logits: logits})


def test_an_engine_that_returns_the_top_tokens_only_is_refused(pair):
    pair.members[0].engine.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="a logits processor may move any token of the vocabulary, and first"):
        pair.with_logits_processors({"first": seesaw}).generate("ab", top_k=2)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mixture"},
        {"method": "speculative"},
        {"method": "conventional"},
        {"method": "greedy"},
        {"method": "greedy", "draft": "first"},
        {"method": "layered", "rule": "max"},
        {"method": "greedy", "rule": "vote"},
        {"method": "conventional", "rule": "vote"},
        {"method": "conventional", "rule": "gac"},
    ],
    ids=str,
)
@pytest.mark.parametrize("language", [{}, {"json_schema": {"type": "integer"}}], ids=["free", "schema"])
def test_no_method_replaces_a_member_that_is_left_with_no_probability(options, language):
    engines = [ToyEngine([*SHARED, b"1", b"2"], seed=seed, name=name) for seed, name in ((1, "first"), (2, "second"))]
    pair = Ensemble([LoadedMember(engine, engine.name) for engine in engines], [0.6, 0.4])
    nothing = pair.with_logits_processors({"first": lambda ids, logits: np.full_like(logits, -np.inf)})
    option = "json_schema" if language else "its logits processor"
    with pytest.raises(UnsupportedError, match=f"first gives no probability to anything that {option} allows here"):
        nothing.generate("ab", raw=True, max_tokens=12, seed=1, **options, **language)


def test_a_processor_that_raises_is_a_users_error_and_drops_no_member(pair):
    broken = pair.with_logits_processors({"first": lambda ids, logits: logits[1 // 0]})
    for method in ("mixture", "conventional"):
        with pytest.raises(ConfigError, match="a logits processor failed: ZeroDivisionError"):
            broken.generate("ab", raw=True, method=method, max_tokens=12, seed=1, on_failure="drop")


def test_where_some_tokens_alone_are_possible_a_processor_sees_all_logits(pair):
    def flatten(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return np.where(logits >= np.sort(logits)[-4], 0.25 * logits, logits)

    context = pair.with_logits_processors({"first": flatten}).context(pair.settings(temperature=1.0, top_k=0))
    view = context.begin_sequence(pair.encode_prompt("ab", pair.settings(raw=True))).views[0]
    logits = pair.members[0].engine.session().logits(view.ids())[0]
    mask = np.arange(len(logits)) % 2 == 0
    mask &= view.member.symbols >= 0
    distribution = drive(view.distribution_among(mask, logits), lambda requests: [])
    expected = softmax(flatten(view.ids(), logits)[mask])
    np.testing.assert_allclose(np.exp(distribution.logprobs), expected, atol=1e-6)
