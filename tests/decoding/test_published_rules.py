"""The published rules: their distributions against a plain second computation, and against the library's own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    Distribution,
    assert_same_distribution,
    driven,
    exact_distribution,
    fixed,
    make_ensemble,
    toys,
    written,
)

from mixlm.config import parse_config
from mixlm.core.combinations import combination
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import TokenHistory, dense_distribution
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.spellings import token_strings
from mixlm.loading import load, load_config
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.verification.check import check
from mixlm.verification.exact import SpellingMember, gac_distribution, unite_distribution

PLACES = [(), (b"a",), (b"ab", b"b", b"c")]
PUBLISHED = {**OPTIONS, "most likely": {"temperature": 0.0}}
PLAIN = {"temperature": 1.0, "top_k": 0}


class Nth:
    """Stands in for noise: takes the n-th of what could be sampled, and notes how many there are."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.count = 1

    def sample(self, symbols: np.ndarray, logprobs: np.ndarray) -> int:
        self.count = len(symbols)
        return min(self.n, self.count - 1)


def strategy_distribution(ensemble: Ensemble, options: dict, pieces=(), prompt: str = "ab") -> Distribution:
    """What a rule may choose, with its probability: every choice is made once, and equal symbols are added up."""
    out: Distribution = defaultdict(float)
    settings = ensemble.settings(method="conventional", **options)
    chosen = ensemble.context(settings).strategy
    n, count = 0, 1
    while n < count:
        noise = Nth(n)
        writing = written(ensemble, {"method": "conventional", **options}, prompt, pieces)
        choice, _ = driven(chosen, writing, ensemble.weights, noise)
        key = END if choice.symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(choice.symbol)
        out[key] += float(np.exp(choice.logprob))
        n, count = n + 1, noise.count
    return dict(out)


def reference(ensemble: Ensemble, options: dict, pieces=(), prompt: str = "ab") -> Distribution:
    """The same by the plain computation, from the toys' tables."""
    settings = ensemble.settings(method="conventional", **options)
    parts = []
    for i, member in enumerate(ensemble.members):
        toy = member.engine
        if ensemble.unit.name == "token":
            ids = [toy.vocabulary.tokens.index(piece) for piece in pieces]
        else:
            ids = toy.encoder.encode(b"".join(pieces)).ids
        read = toy.prompts.raw(prompt).tolist()
        logits = toy.table((*read, *ids)).astype(np.float32)
        symbols = ensemble.unit.symbols(i)
        history = TokenHistory.from_tokens(np.array(read, dtype=np.int64), np.array(ids, dtype=np.int64))
        probs = dense_distribution(logits, settings.member_sampling({}), np.flatnonzero(symbols < 0), history)
        parts.append(SpellingMember(float(ensemble.weights[i]), probs, symbols, toy))
    published = gac_distribution if options["rule"] == "gac" else unite_distribution
    result = published(parts, ensemble.unit.end + 1, settings.combined_sampling({}))
    return {
        END if u == ensemble.unit.end else ensemble.unit.symbol_bytes(u): float(p)
        for u, p in enumerate(result)
        if p > 0
    }


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("rule", ["gac", "unite"])
def test_the_distribution_is_that_of_a_plain_second_computation(rule, unit, members, name):
    options = {**PUBLISHED[name], "rule": rule}
    if rule == "unite" and members == 1:
        pytest.skip("a union needs two members")
    if rule == "unite" and options.get("top_k") == 0:
        options["top_k"] = 2
    ensemble = toys(unit, members)
    for pieces in PLACES:
        assert_same_distribution(
            strategy_distribution(ensemble, options, pieces), reference(ensemble, options, pieces), 1e-6
        )


def spelled(engine, **names: str):
    """Give tokens a spelling of their own, by their bytes; END is written END."""
    vocabulary = engine.vocabulary
    by_bytes = {(b"" if key == "END" else key.encode()): name for key, name in names.items()}
    rows = [
        by_bytes.get(data, vocabulary.name(i)) if data or i in vocabulary.end_ids else vocabulary.name(i)
        for i, data in enumerate(vocabulary.tokens)
    ]
    engine.vocabulary = replace(vocabulary, names=tuple(rows))
    return engine


def two_spellings() -> Ensemble:
    toy = spelled(fixed({"é".encode(): 0.4, b"x": 0.35, END: 0.25}, ("é".encode(), b"x", b"a")), é="Ã©", END="</s>")
    other = spelled(fixed({"é".encode(): 0.4, b"x": 0.35, END: 0.25}, ("é".encode(), b"x", b"a")), END="<eos>")
    return make_ensemble([toy, other], unit="piece")


def test_gac_takes_one_character_in_two_spellings_for_two_tokens():
    ensemble = two_spellings()
    ours = exact_distribution(ensemble, PLAIN, "a")
    assert max(ours, key=ours.get) == "é".encode()
    assert strategy_distribution(ensemble, {"rule": "gac", "temperature": 0.0}, prompt="a") == {b"x": 1.0}
    # Cut to the likeliest, of which "x" is one; the library's own would be "é" and nothing else.
    assert_same_distribution(
        strategy_distribution(ensemble, {"rule": "gac", **PLAIN, "top_k": 1}, prompt="a"), {b"x": 1.0}
    )
    mixed_first = {"mix_then_truncate": True, **PLAIN, "top_k": 1}
    assert_same_distribution(strategy_distribution(ensemble, mixed_first, prompt="a"), {"é".encode(): 1.0})


def test_what_gac_samples_from_the_plain_average_is_the_librarys_own_distribution():
    ensemble = two_spellings()
    assert_same_distribution(
        strategy_distribution(ensemble, {"rule": "gac", **PLAIN}, prompt="a"),
        exact_distribution(ensemble, PLAIN, "a"),
        1e-6,
    )
    assert_same_distribution(
        strategy_distribution(toys("piece", 3), {"rule": "gac", **PLAIN}),
        exact_distribution(toys("piece", 3), PLAIN, "ab"),
        1e-6,
    )


def test_unite_weighs_a_member_by_what_the_others_think_likely():
    ensemble = make_ensemble([fixed({b"a": 0.5, b"c": 0.3, b"b": 0.2}), fixed({b"c": 0.5, b"b": 0.4, b"a": 0.1})])
    options = {"temperature": 1.0, "top_k": 1}
    assert_same_distribution(exact_distribution(ensemble, options, ""), {b"a": 0.5, b"c": 0.5}, 1e-6)
    expected = {b"a": (0.5 / 0.8 + 0.1 / 0.6) / 2, b"c": (0.3 / 0.8 + 0.5 / 0.6) / 2}
    assert_same_distribution(strategy_distribution(ensemble, {"rule": "unite", **options}, prompt=""), expected, 1e-6)
    assert strategy_distribution(ensemble, {"rule": "unite", "top_k": 1, "temperature": 0.0}, prompt="") == {b"c": 1.0}


def test_unite_gives_a_token_that_a_member_lacks_the_probability_of_its_first_token():
    toy = fixed({b"ab": 0.75, b"b": 0.25}, (b"ab", b"a", b"b"))
    other = fixed({b"a": 0.5, b"b": 0.5}, (b"a", b"b"))
    third = fixed({b"b": 0.5, END: 0.5}, (b"b",))  # cannot spell it at all
    ensemble = make_ensemble([toy, other, third], [2, 1, 1], unit="piece")
    union = {"rule": "unite", "temperature": 1.0, "top_k": 1}
    # Joined are "ab"; "a" and "b", equally likely; "b" and the end. The second reads "ab" as "a", the third not at all.
    expected = {
        b"ab": 0.5 * 0.75 + 0.25 * 0.5 / 1.5,
        b"a": 0.25 * 0.5 / 1.5,
        b"b": 0.5 * 0.25 + 0.25 * 0.5 / 1.5 + 0.25 * 0.5,
        END: 0.25 * 0.5,
    }
    assert_same_distribution(strategy_distribution(ensemble, union, prompt=""), expected, 1e-6)


def test_unite_joins_the_ten_likeliest_unless_told_otherwise():
    assert GenerationOptions(method="conventional", rule="unite").combined_sampling({}).top_k == 10
    assert GenerationOptions(method="conventional", rule="unite").combined_sampling({"top_k": 4}).top_k == 4
    assert GenerationOptions(method="conventional", rule="gac").combined_sampling({}).top_k == 20


def test_members_of_no_weight_take_no_part():
    ensemble = make_ensemble([fixed({b"a": 1.0}), fixed({b"b": 1.0})], [1, 0])
    for rule in ("gac", "unite", "geometric", "max"):
        assert_same_distribution(
            strategy_distribution(ensemble, {"rule": rule, **PLAIN, "top_k": 1}, prompt=""), {b"a": 1.0}
        )


def test_the_strings_of_the_union_are_spellings_with_their_signs_read():
    def names(*names: str) -> Vocabulary:
        return Vocabulary((b"x",) * len(names), frozenset(), frozenset(), names)

    assert token_strings(names("Ġa", "ĠĊ", "Ã©", "▁a")) == [" a", " \n", "Ã©", "▁a"]
    assert token_strings(names("▁a", "▁▁", "é", "a▁", "<0x0A>", "Ġ")) == [" a", "  ", "é", "a▁", "<0x0A>", "Ġ"]


@pytest.mark.parametrize("rule", ["gac", "unite"])
@pytest.mark.parametrize("method", ["mixture", "speculative", "auto"])
def test_methods_of_the_average_refuse_a_rule(rule, method):
    with pytest.raises(UnsupportedError, match=f"{method} samples the average, and the rule is {rule}.*'layered'"):
        toys("piece", 2).generate("a", method=method, rule=rule)


def test_what_does_not_go_with_a_rule_is_refused():
    with pytest.raises(ConfigError, match=r"rule is 'unit'; it must be one of average, .*did you mean 'unite'"):
        GenerationOptions(method="conventional", rule="unit")
    with pytest.raises(UnsupportedError, match="rule gac and mix-then-truncate are both given"):
        GenerationOptions(method="conventional", rule="gac", mix_then_truncate=True)
    with pytest.raises(ConfigError, match="top_k is 0, and rule union-top-k"):
        load("toy:1", "toy:2").generate("a", method="conventional", rule="unite", top_k=0)
    alone = make_ensemble([fixed({b"a": 1.0}), fixed({b"a": 1.0})], sampling=[{"top_k": 1}, {}])
    with pytest.raises(UnsupportedError, match="options of their own, and gac has one distribution"):
        alone.generate("a", method="conventional", rule="gac", raw=True)


@pytest.mark.parametrize("rule", ["gac", "unite"])
def test_a_rule_can_be_given_in_the_file(rule):
    members = [{"model": "toy:1"}, {"model": "toy:2"}]
    ensemble = load_config(parse_config({"members": members, "method": "conventional", "rule": rule}, "here"))
    assert ensemble.defaults.rule == rule
    assert ensemble.defaults.method == "conventional"
    expected = load("toy:1", "toy:2").generate("the bird", seed=1, max_tokens=9, method="conventional", rule=rule)
    assert ensemble.generate("the bird", seed=1, max_tokens=9).text == expected.text
    with pytest.raises(ConfigError, match=r"rule is 'unit'.*'unite'"):
        parse_config({"members": members, "rule": "unit"}, "here")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rule": "gac"}, {"rule": "unite"}, {"rule": "gac", "temperature": 0.0}])
def test_check_compares_conventional_with_the_rules_own_distribution(options, monkeypatch):
    ensemble = two_spellings() if options["rule"] == "gac" else toys("piece", 3)
    settings = {"method": "conventional", "raw": True, "top_k": 2, **options}
    report = check(ensemble, "ab" if options["rule"] == "unite" else "a", samples=400, options=settings)
    assert {comparison.left for comparison in report.comparisons} == {"conventional", "layered", "greedy"}
    assert report.equal

    from mixlm.decoding.conventional import conventional
    from mixlm.generation.target import average_target

    for module in ("conventional", "layered"):
        monkeypatch.setattr(f"mixlm.decoding.{module}.build", lambda options, context: conventional(average_target()))
    assert not check(ensemble, "ab" if options["rule"] == "unite" else "a", samples=400, options=settings).equal


def test_greedy_is_the_mode_of_the_union_of_the_given_k():
    rows = {b"a": 0.5, b"b": 0.45, b"c": 0.05}, {b"c": 0.5, b"b": 0.45, b"a": 0.05}
    ensemble = make_ensemble([fixed(row) for row in rows], [0.6, 0.4])
    options = {"raw": True, "rule": "union-top-k"}
    for k, mode in ((1, b"a"), (3, b"b")):
        for draft in (None, "m1"):
            completion = ensemble.generate("a", method="greedy", draft=draft, max_tokens=3, top_k=k, **options)
            assert [token.data for token in completion.tokens] == [mode] * 3
        assert ensemble.distribution("a", method="conventional", top_k=k, **options).symbol_bytes[0] == mode


def test_a_rule_object_has_a_k_of_its_own():
    ensemble = make_ensemble([fixed({b"a": 0.5, b"b": 0.45, b"c": 0.05}), fixed({b"c": 0.5, b"b": 0.45, b"a": 0.05})])
    ensemble = ensemble.with_weights([0.6, 0.4])
    other = ensemble.distribution("a", raw=True, temperature=1.0, rule=combination("union-top-k", k=1))
    assert dict(zip(other.symbol_bytes, other.probs.round(4), strict=True)) == {b"a": 0.5818, b"c": 0.4182}


def test_greedy_is_the_mode_of_unite_between_vocabularies():
    # The second reads "ab" as "a", which union-top-k does not.
    toy, other = fixed({b"ab": 0.55, b"b": 0.45}, (b"ab", b"a", b"b")), fixed({b"a": 0.9, b"b": 0.1}, (b"a", b"b"))
    ensemble = make_ensemble([toy, other], unit="piece")
    for rule, mode in (("unite", b"ab"), ("union-top-k", b"a")):
        greedy = ensemble.generate("a", raw=True, method="greedy", rule=rule, max_tokens=1)
        assert greedy.tokens[0].data == mode
        assert ensemble.distribution("a", raw=True, method="conventional", rule=rule).symbol_bytes[0] == mode


@pytest.mark.parametrize("method", ["greedy", "layered"])
def test_unite_between_vocabularies_joins_a_top_k(method):
    with pytest.raises(ConfigError, match="top_k is 0, and rule union-top-k"):
        toys("piece", 2).generate("a", raw=True, method=method, rule="unite", top_k=0)
