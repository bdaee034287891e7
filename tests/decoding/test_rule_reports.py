"""Rules with engines that report their likeliest tokens alone: the same distribution, by bounds on the others."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import (
    END,
    SHARED,
    VOCABULARIES,
    WEIGHTS,
    Distribution,
    ReportingToy,
    assert_same_distribution,
    driven,
    engine,
    make_ensemble,
    rule_distribution,
    written,
)

from mixlm.core.combinations.union_top_k import UnionTopK
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.routing.base import Observes
from mixlm.verification.check import ReferenceSetup, check

PLAIN = {"temperature": 1.0, "top_k": 0}
RULES = {
    "average": PLAIN,
    "max": PLAIN,
    "power": PLAIN,
    "power below 1": {"rule": "power", "strength": 0.5, **PLAIN},
    "power below 0": {"rule": "power", "strength": -1.0, **PLAIN},
    "min": PLAIN,
    "geometric": PLAIN,
    "geometric at 0.5": {"rule": "geometric", "temperature": 0.5, "top_k": 0},
    "mean-then-truncate": {"temperature": 0.7, "top_k": 3},
    "mean-then-temper": {"temperature": 0.6},
    "nucleus": {"rule": "mean-then-truncate", "temperature": 1.0, "top_k": 0, "top_p": 0.8},
    "min-p": {"rule": "mean-then-truncate", "temperature": 1.0, "top_k": 0, "min_p": 0.2},
    "union-top-k": {"top_k": 2, "temperature": 1.0},
    "union-top-k at 0.5": {"rule": "union-top-k", "top_k": 2, "temperature": 0.5},
    "gac": {"temperature": 0.5, "top_k": 0},
    "contrastive": PLAIN,
    "guidance": PLAIN,
    "proxy": PLAIN,
    "vote": PLAIN,
    "defer": {"strength": 0.3, **PLAIN},
    "defer by token": {"rule": "defer", "by": "token", "strength": 0.25, **PLAIN},
    "hot": {"rule": "mean-then-temper", "temperature": 1.5},
}
MEMBERS = {"contrastive": 2, "guidance": 2, "proxy": 3}
WHOLE = ("guidance", "proxy", "vote", "hot")  # rules for which no bound is known, and all tokens are requested


class Script:
    """Stands in for noise: a coin, a uniform number for each round, and a note of what is sampled from."""

    position = 9  # behind the first positions, where members come first in turn

    def __init__(self, coin: int, *uniforms: float, round: int = 0, of: Script | None = None) -> None:
        self._coin, self._uniforms, self._round = coin, uniforms, round
        self._first = of or self
        self.coins, self.symbols, self.probs = np.ones(1), np.zeros(0, dtype=np.int64), np.zeros(0)

    def coin(self, weights):
        self._first.coins = weights
        return self._coin

    def uniform(self):
        return self._uniforms[self._round]

    def next_round(self):
        return Script(self._coin, *self._uniforms, round=self._round + 1, of=self._first)

    def sample(self, symbols, logprobs):
        self._first.symbols, self._first.probs = symbols, np.exp(logprobs)
        return 0


def reporting(rule: str, unit: str, limit: int = 3, max_top_k: int | None = None) -> tuple[Ensemble, Ensemble, dict]:
    """An ensemble of toys, the same with toys that report few tokens, and the options of a rule."""
    options = {"rule": rule, **RULES[rule]}
    members = MEMBERS.get(options["rule"], 2)
    vocabularies = VOCABULARIES[:members] if unit == "piece" else [SHARED] * members
    toys = [engine(tokens, seed=10 + i) for i, tokens in enumerate(vocabularies)]
    weights = [1.0] * members if options["rule"] in MEMBERS else WEIGHTS[:members]
    few = [ReportingToy(toy, limit, max_top_k) for toy in toys]
    return make_ensemble(toys, weights, unit=unit), make_ensemble(few, weights, unit=unit), options


def choose(ensemble: Ensemble, options: dict, noise: Script, pieces=()) -> int:
    """Sample one symbol; return in how many rounds of requests."""
    strategy = ensemble.context(ensemble.settings(raw=True, **options)).strategy
    _, rounds = driven(strategy, written(ensemble, options, "ab", pieces), ensemble.weights, noise)
    return len(rounds)


def strategy_distribution(ensemble: Ensemble, options: dict, pieces=()) -> tuple[Distribution, list[int]]:
    """The distribution over all coins and uniform numbers, and the rounds of requests of each way to choose."""
    out: Distribution = defaultdict(float)
    rounds: list[int] = []

    def add(share: float, noise: Script) -> None:
        for symbol, probability in zip(noise.symbols.tolist(), noise.probs / noise.probs.sum(), strict=True):
            key = END if symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(symbol)
            out[key] += share * float(probability)

    def levels(share: float, total: float, *before: float, coin: int = 0) -> None:
        """Everything behind the first levels: a uniform number falls into what each of them adds."""
        below = 0.0
        while below < 1 - 1e-9:
            noise = Script(coin, *before, below + 1e-12)
            rounds.append(choose(ensemble, options, noise, pieces))
            # The last of the levels takes what rounding has left.
            width = min(float(noise.probs.sum()) / total, 1 - below)
            add(share * width, noise)
            below += width

    noise = Script(0, 1e-12, 1e-12, 1e-12)
    rounds.append(choose(ensemble, options, noise, pieces))
    if len(noise.coins) == 1:  # no coin is tossed
        levels(1.0, 1.0)
        return dict(out), rounds
    coins, stops = noise.coins, []
    for coin, share in enumerate(coins.tolist()):
        if not share:
            stops.append(1.0)
            continue
        noise = Script(coin, 0.0, 1e-12, 1e-12)
        stopped = choose(ensemble, options, noise, pieces) == 1
        stops.append(min(float(noise.probs.sum()), 1.0) if stopped else 0.0)
        if stopped:
            add(share * stops[-1], noise)
    emitted = float(coins @ stops)
    for coin, stop in enumerate(stops):
        if stop < 1 - 1e-9:
            levels(float(coins[coin]) * (1 - stop), 1 - emitted, 0.0, stop + 1e-12, coin=coin)
    return dict(out), rounds


@pytest.mark.parametrize("rule", RULES)
def test_the_distribution_is_the_rules(rule):
    for unit in ("token", "piece"):
        if unit == "piece" and rule in MEMBERS:
            continue
        whole, few, options = reporting(rule, unit)
        options |= {"method": "layered", "draft": "none"}
        distribution, rounds = strategy_distribution(few, options)
        assert_same_distribution(distribution, rule_distribution(whole, options), 1e-5)
        if rule not in WHOLE:
            assert len(set(rounds)) > 1 or rule in ("contrastive", "union-top-k at 0.5")


def tables(rows: list[list[float]], tokens: list[bytes]) -> list[ToyEngine]:
    """Engines that give the tokens these probabilities at every position, and the rest to the end of text."""
    with np.errstate(divide="ignore"):
        logits = [np.log([*row, 0.0, 1 - sum(row)]) for row in rows]
    return [ToyEngine(tokens, lambda _, row=row: row) for row in logits]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in WHOLE])
def test_unreported_tokens_of_a_reported_symbol_count(rule):
    """A symbol of many tokens is larger than its report: what is reported of another may be less likely."""
    options = {"rule": rule, **RULES[rule], "method": "layered", "draft": "none"}
    if options["rule"] in MEMBERS:  # their members share a vocabulary
        return
    tokens = [b"a", b"b", b"b", b"c", b"b", b"c", b"a"]
    rows = [[0.3, 0.25, 0.15, 0.1, 0.1, 0.04, 0.02], [0.05, 0.02, 0.3, 0.28, 0.01, 0.2, 0.1]]
    toys = tables(rows, tokens)
    for limit in (1, 2, 4):
        for k in (1, 2):
            top_k = {"top_k": k} if options["rule"] == "union-top-k" else {}
            few = make_ensemble([ReportingToy(toy, limit) for toy in toys], [0.6, 0.4], unit="piece")
            distribution, _ = strategy_distribution(few, {**options, **top_k})
            whole = make_ensemble(toys, [0.6, 0.4], unit="piece")
            assert_same_distribution(distribution, rule_distribution(whole, {**options, **top_k}), 1e-5)


@pytest.mark.parametrize("limit", [2, 3])
def test_a_coin_that_emits_too_much_of_reports_is_caught(monkeypatch, limit):
    """Where they become whole, and where they decide the position before."""
    monkeypatch.setattr(UnionTopK, "first_distribution", lambda self, row, *rest: row)
    toys = tables([[0.5, 0.3, 0.1], [0.1, 0.5, 0.3]], [b"a", b"b", b"c"])
    few = make_ensemble([ReportingToy(toy, limit) for toy in toys], unit="token")
    with pytest.raises(ConfigError, match="the bounds of rule union-top-k exceed what it combines"):
        choose(few, {"rule": "union-top-k", "top_k": 1, "temperature": 1.0, "draft": "none"}, Script(0, *[0.99] * 3))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "average"])
def test_greedy_is_the_mode(rule):
    whole, few, options = reporting(rule, "token")
    settings = {**options, "method": "greedy", "raw": True, "max_tokens": 12, "seed": 1}
    assert few.generate("ab", **settings).text == whole.generate("ab", **settings).text


@pytest.mark.parametrize("rule", ["max", "union-top-k", "contrastive", "geometric"])
def test_drafts_do_not_change_the_text(rule):
    _, few, options = reporting(rule, "token")
    settings = {"raw": True, "max_tokens": 24, "seed": 3, "ignore_end": True, **options}
    expected = few.generate("ab", draft="none", **settings).text
    for draft in (None, "m1", "lookup"):
        assert few.generate("ab", draft=draft, block=3, **settings).text == expected


def test_no_more_is_requested_than_decides():
    _, few, options = reporting("contrastive", "token")
    few.generate("ab", raw=True, seed=1, max_tokens=20, **{**options, "alpha": 0.9})
    assert set(few.members[0].engine.counts) == {3}  # one token is plausible, or few that are reported


def test_what_an_engine_does_not_report_is_refused_and_nothing_is_sampled():
    _, few, options = reporting("mean-then-temper", "token", limit=3, max_top_k=4)
    settings = {"raw": True, "max_tokens": 40, "ignore_end": True, **options}
    texts, failed = [], 0
    for seed in range(6):
        generation = few.stream("ab", seed=seed, **settings)
        try:
            texts.append(generation.finish().text)
        except UnsupportedError as error:
            assert "rule mean-then-temper is not decided at this position by the 4 likeliest tokens of m0" in str(error)  # noqa: PT017
            failed += 1
    assert failed
    for rule in WHOLE:
        _, few, options = reporting(rule, "token", limit=3, max_top_k=4)
        with pytest.raises(UnsupportedError, match=f"rule {options['rule']} needs every token's probability here, and"):
            few.generate("ab", raw=True, **options)
    _, few, options = reporting("max", "token", limit=3, max_top_k=4)
    for extra, reason in (({"method": "conventional"}, "method conventional"), ({"top_logprobs": 2}, "top_logprobs")):
        with pytest.raises(UnsupportedError, match=f"{reason} needs every token's probability here"):
            few.generate("ab", raw=True, **{**options, **extra})


def test_an_engine_that_reports_all_serves_what_has_no_bounds():
    whole, few, options = reporting("guidance", "token")
    settings = {"raw": True, "max_tokens": 12, "seed": 1, **options}
    assert few.generate("ab", **settings).text == whole.generate("ab", **settings).text
    expected, actual = (e.distribution("ab", **{**settings, "top_logprobs": 1}) for e in (whole, few))
    np.testing.assert_allclose(actual.probs, expected.probs, atol=1e-6)


class Watching:
    """A router that looks at the first member's likeliest tokens, and weighs it by the first of them."""

    observes = Observes(0, 2)

    def begin(self, context):
        def route(state, observation):
            share = float(np.exp(observation.logprobs[0]))
            return np.array([share, 1 - share])

        return route


@pytest.mark.parametrize("method", ["conventional", "greedy"])
@pytest.mark.parametrize("rule", ["average", "geometric", "max", "vote", "union-top-k"])
def test_what_a_router_observes_of_a_report_is_not_a_members_whole_distribution(rule, method):
    whole, few, options = reporting(rule, "token")
    settings = {**options, "method": method, "raw": True, "max_tokens": 12, "ignore_end": True, "seed": 5}
    if method == "conventional" and rule == "average":
        settings["top_k"] = 2  # of which the report is the whole distribution
    expected = whole.with_router(Watching()).generate("ab", **settings).text
    assert few.with_router(Watching()).generate("ab", **settings).text == expected


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["average", "max"])
def test_check_knows_the_distribution_of_members_that_report_few_tokens(rule):
    whole, few, options = reporting(rule, "piece")
    if rule == "average":  # sampled by members that truncate for themselves; its mode is found by reports
        options = {"top_k": 3}
    own = check(few, "ab", samples=100, options={"raw": True, **options})
    expected = check(few, "ab", samples=100, options={"raw": True, **options}, reference=ReferenceSetup(whole))
    assert own.equal
    statistics = [comparison.statistic for comparison in own.comparisons]
    assert statistics == pytest.approx([comparison.statistic for comparison in expected.comparisons], rel=1e-3)
    assert "greedy" in {comparison.left for comparison in own.comparisons}
