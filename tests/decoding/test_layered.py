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
    engine,
    fixed,
    make_ensemble,
    rule_distribution,
    toys,
    written,
)

from mixlm.binding import LoadedMember
from mixlm.core.combinations import Combination, combination
from mixlm.core.combinations.average import Average
from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.decoding import StrategyContext
from mixlm.decoding.layered import Layered
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.target import RuleTarget
from mixlm.routing import FunctionRouter
from mixlm.types import Sampling
from mixlm.verification.check import check

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

    def __init__(self, coin: int, uniform: float, position: int = 0) -> None:
        self._coin, self._uniform = coin, uniform
        self.weights = np.ones(1)
        self.symbols = np.zeros(0, dtype=np.int64)
        self.probs = np.zeros(0)
        self.position = position

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


def strategy_distribution(
    ensemble: Ensemble, options: dict, pieces=(), position: int = 0
) -> tuple[Distribution, float]:
    """The distribution of a strategy's choices, over all coins and uniform numbers; and the forwards it expects."""
    out: Distribution = defaultdict(float)
    forwards = 0.0
    coin, coins = 0, np.ones(1)
    while coin < len(coins):
        below = 0.0 if coins[coin] else 1.0
        while below < 1 - 1e-9:
            noise = Scripted(coin, below + 1e-12, position)
            strategy = ensemble.context(ensemble.settings(raw=True, **options)).strategy
            _, rounds = driven(strategy, written(ensemble, options, "ab", pieces), ensemble.weights, noise)
            count = sum(len(requests) for requests in rounds)
            coins = noise.weights
            # What is sampled from has the mass of the uniform numbers that lead there.
            last = len(coins) > 1 and below > 0
            width = min(1 - below if last else float(noise.probs.sum()), 1 - below)
            share = float(coins[coin]) * width
            forwards += share * count
            for symbol, probability in zip(noise.symbols.tolist(), noise.probs / noise.probs.sum(), strict=True):
                key = END if symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(symbol)
                out[key] += share * float(probability)
            below += width
        coin += 1
    return dict(out), forwards


def cases(rule: str):
    """Every unit and number of members that a rule takes, with its options."""
    options = {"rule": rule, **RULES[rule]}
    name = options["rule"]
    for members in MEMBERS.get(name, [2, 3]):
        for unit in ("token", "piece"):
            if unit == "token" or name not in ("contrastive", "guidance", "proxy", "gac", "unite"):
                ensemble = toys(unit, members)
                yield (ensemble.with_weights([1] * members) if name in MEMBERS else ensemble), options


def case(rule: str):
    """The last of the cases: with several vocabularies and three members, where the rule takes them."""
    return list(cases(rule))[-1]


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
            assert_same_distribution(distribution, rule_distribution(ensemble, options, pieces), 1e-6)
            assert forwards <= len(ensemble.members) + 1e-9


OTHERS = tuple(rule for rule in RULES if rule != "average")
SPECULATING = ("geometric", "power below 0", "min", "contrastive", "contrastive, original", "proxy", "guidance")
WRITING = {"raw": True, "max_tokens": 24, "ignore_end": True}


@pytest.mark.slow
@pytest.mark.parametrize("rule", SPECULATING)
def test_rules_without_bounds_write_what_conventional_writes(rule):
    ensemble, options = case(rule)
    settings = {**WRITING, "seed": 1, **options}
    expected = ensemble.generate("ab", method="conventional", **settings)
    for draft in (None, "m0", "m1", "lookup", "none"):
        completion = ensemble.generate("ab", draft=draft, block=3, **settings)
        assert [t.data for t in completion.tokens] == [t.data for t in expected.tokens]


@pytest.mark.parametrize("rule", OTHERS)
def test_drafts_and_blocks_do_not_change_the_text(rule):
    ensemble, options = case(rule)
    settings = {**WRITING, "seed": 5, "max_tokens": 40, **options}
    expected = ensemble.generate("ab", draft="none", **settings)
    for draft, block in ((None, 4), ("m1", 2), ("lookup", 4)):
        assert ensemble.generate("ab", draft=draft, block=block, **settings).text == expected.text


@pytest.mark.parametrize("rule", OTHERS)
def test_log_probabilities_of_the_ensemble_change_no_text(rule):
    """With `top_logprobs` every member runs; the log-probabilities are then the rule's own."""
    ensemble, options = case(rule)
    settings = {**WRITING, "seed": 3, "max_tokens": 8, "temperature": 0.9, **options}
    plain = ensemble.generate("ab", **settings)
    complete = ensemble.generate("ab", top_logprobs=3, **settings)
    repeated = ensemble.generate("ab", logprobs_of="ensemble", **settings)
    assert plain.text == complete.text == repeated.text
    for early, whole, again in zip(plain.tokens, complete.tokens, repeated.tokens, strict=True):
        if options["rule"] != "gac":  # its log-probabilities are those of strings
            assert np.isclose(whole.logprob, again.logprob, atol=1e-9)
        assert early.logprob < whole.logprob + 1e-9


@pytest.mark.parametrize("rule", OTHERS)
def test_greedy_takes_the_most_likely_symbol_of_the_rule(rule):
    ensemble, options = case(rule)
    for pieces in [(), (b"a",), (b"b", b"c")]:
        settings = {"method": "greedy", **options}
        strategy = ensemble.context(ensemble.settings(raw=True, **settings)).strategy
        choice, _ = driven(strategy, written(ensemble, settings, "ab", pieces), ensemble.weights, Noise(0))
        key = END if choice.symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(choice.symbol)
        distribution = greedy_reference(ensemble, settings, pieces)
        assert distribution[key] > max(distribution.values()) - 1e-12
    drafted = {**WRITING, "method": "greedy", "seed": 1, **options}
    expected = ensemble.generate("ab", **drafted)
    for draft in ("m1", "lookup"):
        assert ensemble.generate("ab", draft=draft, block=3, **drafted).text == expected.text


def greedy_reference(ensemble, options, pieces):
    """The rule's dense sum, which temperature and truncation of the combination do not change the mode of."""
    if options["rule"] in ("union-top-k", "unite"):  # the k of the union is the rule's own
        return rule_distribution(ensemble, {**options, "method": "conventional", "temperature": 1.0}, pieces)
    return rule_distribution(ensemble, {**options, "method": "greedy", "temperature": 1.0, "top_k": 0}, pieces)


def test_greedy_runs_what_is_one_forward_at_once():
    toy = engine()
    for engines, expected in (([toy, toy], [2]), ([toy, engine(seed=1)], [1, 1])):
        ensemble = make_ensemble(engines)
        settings = {"method": "greedy", "rule": "geometric"}
        strategy = ensemble.context(ensemble.settings(raw=True, **settings)).strategy
        _, rounds = driven(strategy, written(ensemble, settings, "ab", ()), ensemble.weights, Noise(0))
        assert [len(requests) for requests in rounds] == expected


@pytest.mark.parametrize(("slope", "positions"), [(0.02, 5), (0.8, 2), (1.0, 1)])
def test_looked_up_proposals_are_verified_where_a_position_costs_less_than_it_brings(slope, positions):
    ensemble = toys("token", 2)
    single, longer = [Forward(1, 10, 1.0)] * 8, [Forward(5, 10, 1 + 4 * slope)] * 8
    logs = [single + longer] * 2
    # Forwards of both members are one, so that only what costs no forward can draft.
    context = StrategyContext(ensemble.weights, ["m0", "m1"], [{}, {}], [1, 1], lambda: logs, batch_keys=(0, 0))
    strategy = Layered(RuleTarget(combination("geometric")), context)
    writing = written(ensemble, {"rule": "geometric"}, "abab", [b"a", b"b"] * 3)
    requests = next(writing.decode_step(strategy, Noise(0), 32))
    assert [request.last for request in requests] == [positions] * 2


@pytest.mark.slow
def test_a_batch_is_each_sequence_alone():
    ensemble = toys("piece", 3)
    for rule in ("max", "geometric", "mean-then-truncate"):
        options = {**WRITING, "rule": rule, "seed": 9, "max_tokens": 20}
        together = ensemble.generate(["a", "b", "ab"], **options)
        for number, prompt in enumerate(["a", "b", "ab"]):
            alone = ensemble.generate(prompt, sequence=number, **options)
            assert together[number].text == alone.text


def test_weights_may_depend_on_the_text():
    def by_last_byte(prompt, text):
        return [0.8, 0.1, 0.1] if text[-1:] in (b"a", b"") else [0.1, 0.3, 0.6]

    ensemble = toys("piece", 3, router=FunctionRouter(by_last_byte, 3))
    for rule in ("geometric", "power", "vote"):
        options = {**WRITING, "rule": rule, "seed": 2}
        expected = ensemble.generate("ab", draft="none", **options)
        assert ensemble.generate("ab", draft="m1", block=3, **options).text == expected.text


def largest(probs, weights):
    top = probs.max(axis=0)
    return top / top.sum()


def half(probs, weights, ran):
    return probs[list(ran)].max(axis=0) / len(weights)


def too_large(probs, weights, ran):
    return probs[list(ran)].max(axis=0)


def test_a_rule_of_ones_own_is_exact_with_and_without_an_envelope():
    ensemble = toys("token", 2)
    for rule in (largest, Combination.of(largest), Combination.of(largest, half, name="mine")):
        options = {"method": "layered", "draft": "none", "rule": rule}
        for position in (0, 9):  # the bounds are checked at the first positions, which takes all members
            distribution, forwards = strategy_distribution(ensemble, options, (), position)
            assert_same_distribution(distribution, rule_distribution(ensemble, {**options, "rule": "max"}), 1e-6)
            early = isinstance(rule, Combination) and rule.name == "mine" and position == 9
            assert (forwards < 2 - 1e-9) == early


def test_an_envelope_that_is_too_large_is_refused_and_nothing_is_sampled():
    ensemble = toys("token", 2)
    rule = Combination.of(largest, too_large, name="mine")
    generation = ensemble.stream("ab", rule=rule, raw=True, seed=1)
    with pytest.raises(ConfigError, match="bounds of rule mine exceed"):
        next(generation)
    assert generation.completion.tokens == ()
    with pytest.raises(ConfigError, match="bounds of rule mine exceed"):
        check(ensemble, "ab", samples=100, options={"rule": rule, "raw": True})


@pytest.mark.parametrize("draft", [None, "m0", "lookup"])
def test_greedy_refuses_an_envelope_that_is_too_large_too(draft):
    ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4}), fixed({b"a": 0.1, b"c": 0.9})], [0.6, 0.4])
    rule = Combination.of(largest, too_large, name="mine")
    generation = ensemble.stream("ab", rule=rule, raw=True, method="greedy", draft=draft)
    with pytest.raises(ConfigError, match="bounds of rule mine exceed"):
        next(generation)
    assert generation.completion.tokens == ()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda probs, weights: np.full(probs.shape[1], np.nan), "not finite"),
        (lambda probs, weights: -probs[0], "negative"),
        (lambda probs, weights: probs, "shape"),
        (lambda probs, weights: probs[0] * 0.5, "sum to"),
        (lambda probs, weights: "no", "array of numbers"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    generation = toys("token", 2).stream("ab", rule=function, raw=True, seed=1)
    with pytest.raises(ConfigError, match=message):
        next(generation)
    assert generation.completion.tokens == ()


def test_roles_say_which_member_is_which():
    first, second = fixed({b"a": 0.5, b"b": 0.4, b"c": 0.1}), fixed({b"a": 0.2, b"b": 0.6, b"c": 0.2})
    options = {"rule": "contrastive", "method": "conventional", "temperature": 1.0, "top_k": 0, "alpha": 0.0}

    def distribution(*roles):
        members = [
            LoadedMember(toy, f"m{i}", {}, role)
            for i, (toy, role) in enumerate(zip([first, second], roles, strict=True))
        ]
        return strategy_distribution(Ensemble(members), options)[0]

    assert_same_distribution(distribution(None, None), distribution("expert", "amateur"))
    expected = np.array([0.2**1.5 / 0.5**0.5, 0.6**1.5 / 0.4**0.5, 0.2**1.5 / 0.1**0.5])
    swapped = distribution("amateur", "expert")
    assert_same_distribution(swapped, dict(zip([b"a", b"b", b"c"], expected / expected.sum(), strict=True)), 1e-6)
    for roles, message in (
        (("expert", None), "m1 has no role, and rule contrastive has the roles expert, amateur"),
        (("expert", "amateurs"), "did you mean 'amateur'"),
        (("expert", "expert"), "several members have the role expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            distribution(*roles)


def test_what_does_not_fit_a_rule_is_refused():
    two, pieces = toys("token", 2), toys("piece", 2)
    with pytest.raises(ConfigError, match="rule proxy combines 3 members"):
        two.generate("ab", rule="proxy")
    with pytest.raises(ConfigError, match="rule max needs 2 members, and there is 1"):
        make_ensemble([engine()]).generate("ab", rule="max")
    with pytest.raises(UnsupportedError, match="members with different vocabularies"):
        pieces.with_weights([1, 1]).generate("ab", rule="contrastive")
    with pytest.raises(ConfigError, match="tells its members apart by their roles"):
        two.generate("ab", rule="contrastive")
    routed = Ensemble(two.members, router=FunctionRouter(lambda prompt, text: [0.9, 0.1], 2))
    with pytest.raises(ConfigError, match="a router gives weights, and rule contrastive tells its members apart"):
        routed.generate("ab", rule="contrastive", raw=True)
    with pytest.raises(ConfigError, match="it must be a name, a Combination, or a function"):
        two.generate("ab", rule=Average)
    for unit in ("word", "byte"):
        with pytest.raises(UnsupportedError, match="rule max combines the members' distributions over whole"):
            pieces.with_unit(unit).generate("ab", rule="max")
    apart = [fixed({b"a": 0.5, b"ab": 0.5}), fixed({b"b": 0.5, b"c": 0.5})]
    with pytest.raises(UnsupportedError, match="no token is possible under all members"):
        make_ensemble(apart).generate("ab", rule="geometric", raw=True)


@pytest.mark.slow
def test_a_rule_beside_a_method_without_one_is_refused():
    """The method may be that of the ensemble: a rule of a call has an effect, or is refused."""
    alone = toys("token", 2, defaults=GenerationOptions(method="single"))
    for options in ({"rule": "max"}, {"rule": largest}, {"mix_then_truncate": True}):
        with pytest.raises(ConfigError, match="and method single samples one member without a rule"):
            alone.generate("a", raw=True, **options)
    assert alone.generate("a", raw=True, max_tokens=1, rule="average", seed=1).tokens[0].member == "m0"
    # The other way round, the method says that one member writes.
    ruled = toys("token", 2, defaults=GenerationOptions(method="layered", rule="max"))
    assert ruled.generate("a", raw=True, max_tokens=1, method="single", seed=1).tokens[0].member == "m0"


def test_guidance_between_equal_prompts_is_refused():
    one = engine()
    ensemble = Ensemble([LoadedMember(one, "m0"), LoadedMember(one, "m1")])
    with pytest.raises(ConfigError, match="both prompts of rule guidance are the same, so it changes nothing"):
        ensemble.generate("ab", raw=True, rule="guidance")
    ensemble.generate("ab", raw=True, rule="geometric", max_tokens=1)
    changed = ensemble.with_logits_processors({"m1": lambda ids, logits: logits / 2})
    changed.generate("ab", raw=True, rule="guidance", max_tokens=1)


@pytest.mark.parametrize("draft", [{}, {"draft": "none"}, {"draft": "lookup"}])
def test_both_prompts_of_guidance_run_in_one_forward(draft):
    shared = engine()
    members = [LoadedMember(shared, "m0"), LoadedMember(shared, "m1")]
    ensemble = Ensemble(members).with_logits_processors({"m1": lambda ids, logits: logits / 2})
    calls, respond = [], shared.respond

    def recorded(requests):
        calls.append(len(requests))
        return respond(requests)

    shared.respond = recorded
    ensemble.generate("ab", raw=True, rule="guidance", seed=1, max_tokens=100, ignore_end=True, **draft)
    assert set(calls) == {2}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["geometric", "max", "mean-then-truncate", "vote"])
def test_check_finds_no_difference(rule):
    report = check(toys("piece", 3), "ab", samples=400, options={"rule": rule, "raw": True, "temperature": 0.9})
    assert report.equal
    assert {comparison.left for comparison in report.comparisons} == {"conventional", "layered", "greedy"}


def fails(*arguments):
    return 1 / 0


class SometimesBounded(type(combination("max"))):
    """A user's rule whose envelope is known at some positions only."""

    def first_member(self, weights):
        return None

    def envelope(self, probs, weights, ran, unreported=None):
        return super().envelope(probs, weights, ran, unreported) if probs.shape[1] <= 4 else None


def test_an_envelope_may_be_known_at_some_positions_only():
    ensemble = toys("token", 3)
    options = {"method": "layered", "rule": SometimesBounded(), "draft": "none"}
    for top_k in (2, 3, 4):  # so that the number of symbols differs
        distribution, _ = strategy_distribution(ensemble, {**options, "top_k": top_k})
        assert_same_distribution(distribution, rule_distribution(ensemble, {**options, "top_k": top_k}), 1e-6)


def test_a_function_that_raises_is_one_clear_sentence():
    ensemble = toys("token", 2)
    for method in ("layered", "conventional"):
        with pytest.raises(ConfigError, match="rule function failed: ZeroDivisionError: division by zero"):
            ensemble.generate("a", raw=True, method=method, rule=fails)
    with pytest.raises(ConfigError, match="the envelope of rule function failed: ZeroDivisionError"):
        ensemble.generate("a", raw=True, rule=Combination.of(largest, fails), draft="none")


@pytest.mark.parametrize("sampling", [{"top_k": 0}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("rule", ["mean-then-truncate", "geometric"])
def test_near_temperature_0_it_writes_what_greedy_writes(rule, sampling):
    for weights in ([1, 1, 1], [6, 4, 1]):
        ensemble = toys("token", 3).with_weights(weights)
        greedy = ensemble.generate("ab", rule=rule, method="greedy", **WRITING).text
        for temperature in (0.001, 0.0001):
            options = {**WRITING, **sampling, "rule": rule, "temperature": temperature, "seed": 1}
            assert ensemble.generate("ab", draft="none", **options).text == greedy


def test_temperature_leaves_a_rule_what_it_says_of_itself():
    for name in ("geometric", "mean-then-truncate"):
        rule = combination(name)
        assert rule.with_sampling(Sampling(temperature=0.7)).speculates == rule.speculates


def test_members_may_join_later():
    """One member alone has no envelope to look at, two have."""
    ensemble = toys("token", 2, router=FunctionRouter(lambda prompt, text: [0.5, 0.5] if text else [1, 0], 2))
    completion = ensemble.generate("ab", rule=Combination.of(largest, half), draft="none", seed=1, **WRITING)
    assert sum(member.forwards for member in completion.usage.members.values()) < 2 * len(completion.tokens) - 4


def test_near_exponent_0_the_power_mean_is_written():
    ensemble = toys("token", 3).with_weights([2, 3, 5])
    for strength in (0.001, 0.0001):
        options = {**WRITING, "rule": "power", "strength": strength, "seed": 1}
        assert ensemble.generate("ab", draft="none", **options).tokens


@pytest.mark.parametrize("method", ["greedy", "layered"])
def test_a_member_without_weight_may_draft(method):
    ensemble = toys("token", 3).with_weights([1, 1, 0])
    options = {**WRITING, "method": method, "rule": "max", "seed": 1}
    expected = ensemble.generate("ab", draft="none", **options)
    drafted = ensemble.generate("ab", draft="m2", **options)
    assert drafted.text == expected.text
    assert drafted.usage.drafted > 0
