"""`Ensemble.distribution`: the exact distribution of the next symbol, against the reference and against samples."""

from __future__ import annotations

import numpy as np
import pytest
from toys import SHARED, engine

import mixlm
from mixlm.binding import LoadedMember
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import Transform
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.generation.member import Member
from mixlm.generation.next_distribution import NextDistribution
from mixlm.types import Sampling
from mixlm.verification.exact import ExactReference

OTHERS = [b"a", b"b", b"ab", b"c", b"abc", b"d"]


@pytest.fixture
def pair() -> Ensemble:
    members = [ToyEngine(SHARED, seed=1, name="first"), ToyEngine(SHARED, seed=2, name="second")]
    return Ensemble([LoadedMember(member, member.name) for member in members], [0.7, 0.3])


def dense(distribution: NextDistribution, size: int) -> np.ndarray:
    probs = np.zeros(size)
    probs[distribution.symbols] = distribution.probs
    return probs


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"temperature": 0.5, "min_p": 0.1}, {"method": "single"}], ids=str
)
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_it_is_that_of_the_reference(pair, unit, options):
    ensemble = pair.with_unit(unit)
    distribution = ensemble.distribution("ab", raw=True, **options)
    settings = ensemble.settings(raw=True, **options)
    expected = ExactReference(ensemble, settings, ensemble.encode_prompt("ab", settings)).first
    np.testing.assert_allclose(dense(distribution, len(expected)), expected, atol=1e-12)
    np.testing.assert_allclose(distribution.weights @ distribution.members, distribution.probs, atol=1e-12)
    assert (np.diff(distribution.probs) <= 0).all()
    assert distribution.names == (("first",) if options.get("method") == "single" else ("first", "second"))


def test_symbol_bytes_are_those_that_a_completion_has(pair):
    distribution = pair.distribution("ab", raw=True)
    probs = dict(zip(distribution.symbol_bytes, distribution.probs.tolist(), strict=True))
    assert set(probs) == {*SHARED, b""} == {*distribution.units}
    completion = pair.generate("ab", raw=True, seed=0, max_tokens=1, method="conventional", ignore_end=True)
    without_end = pair.distribution("ab", raw=True, ignore_end=True)
    assert b"" not in without_end.symbol_bytes
    token = completion.tokens[0]
    assert np.log(without_end.probs[without_end.symbol_bytes.index(token.data)]) == pytest.approx(token.logprob)


def test_different_vocabularies_meet_as_bytes():
    members = [ToyEngine(SHARED, seed=1, name="first"), ToyEngine(OTHERS, seed=2, name="second")]
    ensemble = Ensemble([LoadedMember(member, member.name) for member in members])
    distribution = ensemble.distribution("ab", raw=True)
    assert len(distribution.symbol_bytes) == len(set(distribution.symbol_bytes)) == len({*SHARED, *OTHERS, b""})
    np.testing.assert_allclose(distribution.members.sum(axis=1), 1)
    only_second = distribution.symbol_bytes.index(b"d")
    assert distribution.members[0, only_second] == 0 < distribution.members[1, only_second]


def test_a_rule_has_its_own(pair):
    distribution = pair.distribution("ab", raw=True, rule="geometric", temperature=1.0, top_k=0)
    product = np.prod(distribution.members ** distribution.weights[:, None], axis=0)
    np.testing.assert_allclose(distribution.probs, product / product.sum(), atol=1e-12)


def test_it_shows_the_most_likely(pair):
    shown = repr(pair.distribution("ab", raw=True))
    assert shown.startswith(f"<NextDistribution of {len(SHARED) + 1} symbols by first, second: b'")


@pytest.mark.parametrize("unit", ["word", "byte"])
def test_units_without_a_common_distribution_are_refused(unit):
    with pytest.raises(UnsupportedError, match=rf"in the unit {unit} members have no common .*with_unit\('piece'\)"):
        mixlm.load("toy:1", "toy:2", unit=unit).distribution("x")


def test_members_without_weight_do_not_run(pair):
    distribution = pair.with_weights([1, 0]).distribution("ab", raw=True)
    assert distribution.names == ("first",)
    assert distribution.members.shape == (1, len(distribution))
    assert isinstance(pair.defaults, GenerationOptions)


def test_what_engines_sample_themselves_from_their_top_tokens_is_no_whole_distribution(pair):
    for member in pair.members:
        member.engine.top_k_limit = 4
        member.engine.samples_itself = lambda sampling, banned: True
    with pytest.raises(UnsupportedError, match="reports its 4 most likely tokens only"):
        pair.distribution("ab", raw=True, method="mixture", top_k=0)


def test_tokens_of_one_symbol_are_added_up_at_every_position():
    """Ids and symbols that stay the same are kept from one position to the next; a sum that underflows is left out."""
    toy = engine([b"a", b"b", b"a", b"b"])
    symbols = np.array([0, 1, 0, 1, -1, 4])
    member = Member(toy, "m", Transform(Sampling(temperature=1.0, top_k=0), np.array([4])), symbols)
    for logits, expected in (
        ([0.0, 1.0, 2.0, 3.0, 9.0, 4.0], {0: 1 + np.exp(2), 1: np.exp(1) + np.exp(3), 4: np.exp(4)}),
        ([3.0, 1.0, 2.0, 3.0, 9.0, 4.0], {0: np.exp(3) + np.exp(2), 1: np.exp(1) + np.exp(3), 4: np.exp(4)}),
        ([3.0, -2000.0, 2.0, -2000.0, 9.0, 4.0], {0: np.exp(3) + np.exp(2), 4: np.exp(4)}),
        ([0.0, -np.inf, 2.0, 3.0, 9.0, 4.0], {0: 1 + np.exp(2), 1: np.exp(3), 4: np.exp(4)}),
    ):
        ids, logprobs = member.map_to_symbols(member.transform(np.array(logits)))
        total = sum(expected.values())
        assert dict(zip(ids.tolist(), np.exp(logprobs), strict=True)) == pytest.approx(
            {symbol: mass / total for symbol, mass in expected.items()}
        )
