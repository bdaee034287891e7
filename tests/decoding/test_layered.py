"""Combination rules: what `layered`, `conventional` and `greedy` sample, against the rule's dense sum on toys."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    SHARED,
    Distribution,
    assert_same_distribution,
    driven,
    member_distribution,
    toys,
    written,
)

from mixlm.ensemble import Ensemble

PLACES = [(), (b"a", b"b")]
PLAIN = OPTIONS["plain"]
SAMPLINGS = {
    "plain": PLAIN,
    "defaults": {},
    "temperature": OPTIONS["temperature"],
    "top_k": OPTIONS["top_k"],
    "top_p": OPTIONS["top_p"],
}
RULES = {
    "average": {},
    "geometric": {},
    "power": {},
    "power below 1": {"rule": "power", "strength": 0.5},
    "power below 0": {"rule": "power", "strength": -1.0},
    "max": {},
    "min": {},
    "contrastive": {},
    "contrastive, original": {"rule": "contrastive", "form": "original", "strength": 1.0, "alpha": 0.3},
    "proxy": {},
    "guidance": {},
    "mean-then-truncate": {},
    "mean-then-temper": {"top_k": 0, "top_p": 1.0},
    "union-top-k": {"top_k": 2},
    "unite": {"top_k": 2},
    "gac": {},
    "vote": {},
    "defer": {},
    "defer by token": {"rule": "defer", "by": "token", "strength": 0.2},
}
MEMBERS = {"contrastive": [2], "guidance": [2], "proxy": [3]}
PIECES = (*SHARED, END)


class Scripted:
    """Stands in for noise: a coin and a uniform number of choice, and a note of what is sampled from."""

    def __init__(self, coin: int, uniform: float) -> None:
        self._coin, self._uniform = coin, uniform
        self.weights = np.ones(1)
        self.symbols = np.zeros(0, dtype=np.int64)
        self.probs = np.zeros(0)
        self.position = 0

    def coin(self, weights):
        self.weights = weights
        return self._coin

    def uniform(self):
        return self._uniform

    def next_round(self):
        return self

    def sample(self, symbols, logprobs):
        self.symbols, self.probs = symbols, np.exp(logprobs)
        return 0


def strategy_distribution(ensemble: Ensemble, options: dict, pieces=()) -> tuple[Distribution, float]:
    """The distribution of a strategy's choices, over all coins and uniform numbers; and the forwards it expects."""
    out: Distribution = defaultdict(float)
    forwards = 0.0
    coin, coins = 0, 1
    while coin < coins:
        below = 0.0
        while below < 1 - 1e-9:
            noise = Scripted(coin, below + 1e-12)
            strategy = ensemble.context(ensemble.settings(raw=True, **options)).strategy
            _, rounds = driven(strategy, written(ensemble, options, "ab", pieces), ensemble.weights, noise)
            count = sum(len(requests) for requests in rounds)
            coins = len(noise.weights)
            # Early, what is sampled from has the mass of the uniform numbers that lead there.
            width = 1 - below if count == len(ensemble.members) else float(noise.probs.sum())
            share = float(noise.weights[coin]) * width if coins > 1 else width
            forwards += share * count
            for symbol, probability in zip(noise.symbols.tolist(), noise.probs / noise.probs.sum(), strict=True):
                key = END if symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(symbol)
                out[key] += share * float(probability)
            below += width
        coin += 1
    return dict(out), forwards


def reference(ensemble: Ensemble, options: dict, pieces=()) -> Distribution:
    """The rule's dense sum over the members' distributions, by the toys' tables."""
    settings = ensemble.settings(raw=True, **options)
    rows = []
    for member in ensemble.members:
        toy = member.engine
        if ensemble.unit.name == "token":
            ids = [toy.vocabulary.tokens.index(piece) for piece in pieces]
        else:
            ids = toy.encoder.encode(b"".join(pieces)).ids
        read = toy.prompts.raw("ab").tolist()
        rows.append(member_distribution(toy, settings.member_sampling(member.sampling), read, ids))
    keys = sorted({key for row in rows for key in row})
    probs = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
    rule = settings.combination
    after = settings.combined_sampling({})
    combined = (rule if after is None else rule.with_sampling(after)).combine(probs, ensemble.weights)
    return {key: float(p) for key, p in zip(keys, combined, strict=True) if p > 0}


def cases(rule: str):
    """Every unit and number of members that a rule takes, with its options."""
    options = {"rule": rule, **RULES[rule]}
    name = options["rule"]
    for members in MEMBERS.get(name, [2, 3]):
        for unit in ("token", "piece"):
            if unit == "token" or name not in ("contrastive", "guidance", "proxy", "gac", "unite"):
                ensemble = toys(unit, members)
                yield (ensemble.with_weights([1] * members) if name in MEMBERS else ensemble), options


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["layered", "conventional"])
def test_the_distribution_is_the_rules(method, rule, sampling):
    for ensemble, extra in cases(rule):
        options = {"method": method, **SAMPLINGS[sampling], **extra}
        if method == "layered":
            options["draft"] = "none"
        elif options["rule"] == "average":
            continue  # the average's own strategy, in test_conventional
        for pieces in PLACES[-1:]:
            distribution, forwards = strategy_distribution(ensemble, options, pieces)
            assert_same_distribution(distribution, reference(ensemble, options, pieces), 1e-6)
            assert forwards <= len(ensemble.members) + 1e-9
