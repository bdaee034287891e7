from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    SHARED,
    VOCABULARIES,
    ReportingToy,
    assert_same_distribution,
    assert_sampled_from,
    counted,
    driven,
    engine,
    fixed,
    make_ensemble,
    member_distribution,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.word_mixture import MAX_UNVERIFIED, word_mixture
from mixlm.engines.requests import SampleRequest, SampleResponse
from mixlm.engines.toy import ToyEngine
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import Choice
from mixlm.types import Sampling
from mixlm.units.word import begins_word
from mixlm.verification.exact import ExactReference

WEIGHTS = [0.5, 0.2, 0.3]


def three(**options: Any):
    """Three members of different vocabularies; symbols that begin words are likely enough to be seen."""
    engines = [engine(tokens, seed=20 + i) for i, tokens in enumerate((SHARED, *VOCABULARIES[1:3]))]
    return make_ensemble(engines, WEIGHTS, unit="word", **options)


def plain_distributions(
    ensemble, options, prompt: str, text: bytes, without=lambda _: False
) -> list[dict[bytes, float]]:
    """Each member's distribution over byte strings behind a text."""
    out = []
    for member in ensemble.members:
        ids = member.engine.encoder.encode(text).ids if text else []
        sampling = Sampling(**{**member.sampling, **options})
        out.append(
            member_distribution(member.engine, sampling, member.engine.prompts.raw(prompt).tolist(), ids, without)
        )
    return out


def begins(data: bytes, text: bytes) -> bool:
    return data == END or begins_word(data, text)


def definition(ensemble, options, prompt: str, path) -> dict[tuple[bytes, int], float]:
    """The distribution of the next symbol and its writer behind a path of such, by the definition in words."""
    text = b"".join(data for data, _ in path)
    distributions = plain_distributions(ensemble, options, prompt, text)
    if not path:
        return {
            (u, i): w * p
            for i, (w, distribution) in enumerate(zip(ensemble.weights, distributions, strict=True))
            for u, p in distribution.items()
        }
    owner = path[-1][1]
    out = {(u, owner): p for u, p in distributions[owner].items() if not begins(u, text)}
    ended = 1 - sum(out.values())
    only = plain_distributions(ensemble, options, prompt, text, lambda u: not begins(u, text))
    for i, (weight, distribution) in enumerate(zip(ensemble.weights, distributions, strict=True)):
        first = {u: p for u, p in distribution.items() if begins(u, text)} or only[i]
        for u, p in first.items():
            out[u, i] = out.get((u, i), 0.0) + weight * ended * p / sum(first.values())
    return out


class Path:
    """Stands in for noise: takes one path through the draws of a position, and notes how likely it was."""

    def __init__(self, coin: int, takes: list[int], first: Path | None = None) -> None:
        self._coin, self.takes = coin, takes
        self.sizes: list[int] = first.sizes if first else []
        self.odds: list[float] = first.odds if first else []
        self.drawn = False
        self.next: Path | None = None

    @property
    def probability(self) -> float:
        return float(np.prod(self.odds))

    def coin(self, weights: np.ndarray) -> int:
        self.odds.append(float(weights[self._coin]))
        return self._coin

    def next_round(self) -> Path:
        self.next = self.next or Path(self._coin, self.takes, self)
        return self.next

    def sample(self, symbols: np.ndarray, logprobs: np.ndarray) -> int:
        assert not self.drawn, "a second draw needs noise of its own"
        self.drawn = True
        take = self.takes[len(self.sizes)] if len(self.sizes) < len(self.takes) else 0
        self.sizes.append(len(symbols))
        self.odds.append(float(np.exp(logprobs[take])))
        return take


def enumerated(strategy, writing, weights) -> Iterator[tuple[Any, float]]:
    """Every outcome of a strategy at one place, with its probability: all coins, all samples."""
    for coin in range(len(weights)):
        takes: list[int] = []
        while True:
            path = Path(coin, takes)
            choice, _ = driven(strategy(), writing(), weights, path)
            yield choice, path.probability
            takes = takes[: len(path.sizes)] + [0] * (len(path.sizes) - len(takes))
            while takes and takes[-1] + 1 == path.sizes[len(takes) - 1]:
                takes.pop()
            if not takes:
                break
            takes[-1] += 1


def one_by_one(step):
    """The unit as its definition says it: who has the word draws first, and the next one where it has ended."""
    coin = step.noise.coin(step.weights)
    state = step.views[0].state
    z = coin if state.owner is None else state.owner
    view, following = step.views[z], step.views[coin]
    [sampled] = yield [SampleRequest(z, view.ids(), view.sampler(step.noise))]
    begun = state.word_start_marker()
    if z == coin or not begun(np.array([sampled.symbol]))[0]:
        return [Choice(sampled.symbol, z, sampled.logprob)]

    def beginning(logits):
        distribution = following.bind_distribution()
        symbols, logprobs = distribution(logits)
        if not begun(symbols).any():
            others = (following.member.symbols < 0) | ~begun(following.member.symbols)
            if not np.isfinite(logits[~others]).any():
                return None
            symbols, logprobs = distribution(np.where(others, -np.inf, logits))
        usable = begun(symbols) & np.isfinite(logprobs)
        symbols, logprobs = symbols[usable], logprobs[usable]
        logprobs = logprobs - np.logaddexp.reduce(logprobs)
        index = step.noise.next_round().sample(symbols, logprobs)
        return SampleResponse(int(symbols[index]), float(logprobs[index]))

    [anew] = yield [SampleRequest(coin, following.ids(), beginning)]
    return [Choice(sampled.symbol, z, sampled.logprob) if anew is None else Choice(anew.symbol, coin, anew.logprob)]


def state_at(ensemble, options, path):
    """A text that stands behind a path of symbols and their writers."""
    writing = written(ensemble, options, "ab", [])
    for data, member in path:
        tokens = ensemble.members[member].engine.vocabulary.tokens
        writing.state.append(int(ensemble.unit.symbols(member)[tokens.index(data)]))
    return writing


def strategy_distribution(ensemble, options, path, longest: int = MAX_UNVERIFIED) -> dict[tuple[bytes, int], float]:
    distribution = defaultdict(float)
    for choice, probability in enumerated(
        lambda: word_mixture(longest), lambda: state_at(ensemble, options, path), ensemble.weights
    ):
        if probability == 0:
            continue
        data = END if choice.symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(choice.symbol)
        assert data == END or choice.symbol // ensemble.unit.count == choice.member
        distribution[data, choice.member] += probability
    return dict(distribution)


PATHS = [
    (),
    ((b"a", 0),),
    ((b" c", 2),),
    ((b"ab", 1), (b" ", 1)),
    ((b"ab", 0), (b" c", 2), (b"abc", 2)),
    ((b"b", 2), (b" ", 0), (b"b", 0), (b" ", 1), (b"c", 1)),
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("longest", [1, MAX_UNVERIFIED])
def test_the_distribution_over_coins_and_samples_is_the_definition(path, name, longest):
    options = OPTIONS[name]
    result = strategy_distribution(three(), options, path, longest)
    assert_same_distribution(result, definition(three(), options, "ab", path), 1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_the_definition(name):
    ensemble, options = three(), OPTIONS[name]
    unit, settings = ensemble.unit, ensemble.settings(raw=True, seed=0, **options)
    exact = ExactReference(ensemble, settings, ensemble.encode_prompt("ab", settings))
    for path in PATHS:
        tokens = [(member, ensemble.members[member].engine.vocabulary.tokens.index(data)) for data, member in path]
        result = exact.distribution([int(unit.symbols(member)[token]) for member, token in tokens])
        expected = np.zeros(unit.end + 1)
        for (data, member), probability in definition(ensemble, options, "ab", path).items():
            vocabulary = ensemble.members[member].engine.vocabulary.tokens
            expected[unit.end if data == END else unit.symbols(member)[vocabulary.index(data)]] += probability
        np.testing.assert_allclose(result, expected, atol=1e-9)


def texts(distribution, length: int) -> dict[tuple[bytes, ...], float]:
    """The distribution over the first symbols, from the distribution of the next."""
    out = defaultdict(float)

    def go(path, probability: float) -> None:
        if len(path) == length or (path and path[-1][0] == END):
            out[tuple(data for data, _ in path)] += probability
            return
        for step, p in distribution(path).items():
            go((*path, step), probability * p)

    go((), 1.0)
    return dict(out)


def small():
    return make_ensemble(
        [engine((b"a", b" ", b" b", b"b"), seed=3), engine((b" ", b"b", b"a"), seed=4)], [0.6, 0.4], unit="word"
    )


@pytest.mark.slow
def test_the_distribution_over_whole_texts_is_the_mixture_of_words():
    """Word by word: who writes one is sampled by weight, and writes it as it would alone, given that one begins."""
    ensemble, options = small(), {"temperature": 1.0, "top_k": 0}
    length = 4

    def spelled(member: int, before: bytes, word: tuple[bytes, ...], *, first: bool) -> float:
        """The probability that a member's word begins with these symbols."""
        probability, text = 1.0, before
        for number, data in enumerate(word):
            distribution = plain_distributions(ensemble, options, "ab", text)[member]
            if number == 0 and not first:
                probability /= sum(p for u, p in distribution.items() if begins(u, text))
            probability *= distribution.get(data, 0.0)
            text += data
        return probability

    def ends(member: int, text: bytes) -> float:
        return sum(p for u, p in plain_distributions(ensemble, options, "ab", text)[member].items() if begins(u, text))

    def whole(pieces: tuple[bytes, ...]) -> float:
        cut, text = [0], b""
        for number, data in enumerate(pieces):
            if number and begins(data, text):
                cut.append(number)
            text += data
        probability, text = 1.0, b""
        for number, (start, stop) in enumerate(zip(cut, [*cut[1:], len(pieces)], strict=True)):
            word = pieces[start:stop]
            after = text + b"".join(word)
            probability *= sum(
                weight
                * spelled(member, text, word, first=number == 0)
                * (1.0 if stop == len(pieces) else ends(member, after))
                for member, weight in enumerate(ensemble.weights)
            )
            text = after
        return probability

    result = texts(lambda path: strategy_distribution(ensemble, options, path), length)
    assert sum(result.values()) == pytest.approx(1)
    assert_same_distribution(result, {pieces: whole(pieces) for pieces in result}, 1e-9)


@pytest.mark.slow
def test_completions_follow_the_distribution():
    ensemble, options = small(), {"temperature": 1.0, "top_k": 0}
    distribution = texts(partial(definition, ensemble, options, "ab"), 3)

    def sampled_text(sequence: int) -> tuple[bytes, ...]:
        done = ensemble.generate("ab", raw=True, seed=5, sequence=sequence, max_tokens=3, **options)
        return (*(token.data for token in done.tokens), *([END] if done.finish_reason == "stop" else []))

    assert_sampled_from(counted(sampled_text, 1200), distribution)


@pytest.mark.slow
def test_the_second_sample_does_not_follow_from_the_first():
    """End-of-text is one symbol for all members: with the same noise, the first member's win would favour it."""
    first, two = fixed({b"a": 0.9, END: 0.1}), fixed({b" ": 0.7, END: 0.3})
    ensemble = make_ensemble([first, two], [1e-9, 1], unit="word")
    for longest in (1, MAX_UNVERIFIED):
        counts = defaultdict(int)
        for sequence in range(1000):
            choice, _ = driven(
                word_mixture(longest), at_plain(ensemble, [(b"a", 0)]), ensemble.weights, Noise(1, sequence)
            )
            counts[END if choice.symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(choice.symbol)] += 1
        assert_sampled_from(counts, {b"a": 0.9, b" ": 0.07, END: 0.03})


def at_plain(ensemble, path):
    return state_at(ensemble, {"temperature": 1.0, "top_k": 0}, path)


def test_who_goes_on_with_a_word_is_asked_alone_and_a_switch_asks_one_more():
    ensemble = three()
    switched = set()
    for position in range(200):
        writing = state_at(ensemble, {}, [(b"a", 0)])
        noise = Noise(1, 0, position)
        coin = noise.coin(ensemble.weights)
        choice, rounds = driven(word_mixture(1), writing, ensemble.weights, noise)
        members = [request.member for [request] in rounds]
        begun = choice.symbol == ensemble.unit.end or begins_word(ensemble.unit.symbol_bytes(choice.symbol), b"a")
        assert members == ([0, coin] if begun and coin != 0 else [0])
        assert choice.member == members[-1]
        switched.add(len(members))
    assert switched == {1, 2}


def generated(ensemble, strategy, options, monkeypatch, prompts="ab"):
    """What a strategy writes: symbols, members, log-probabilities and why it ended; and the forwards it took."""
    monkeypatch.setattr("mixlm.decoding.word_mixture.build", lambda options, context: strategy)
    completion = ensemble.generate(prompts, raw=True, **options)
    completion = completion if isinstance(completion, list) else [completion]
    texts = [([(t.data, t.member) for t in completion.tokens], completion.finish_reason) for completion in completion]
    logprobs = [t.logprob for completion in completion for t in completion.tokens]
    return texts, logprobs, sum(m.forwards for completion in completion for m in completion.usage.members.values())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.5, 0.2, 0.3), (0.1, 0.1, 0.8)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_text_is_the_same_whenever_the_ends_of_words_are_looked_at(name, weights, monkeypatch):
    engines = [engine(tokens, seed=20 + i) for i, tokens in enumerate((SHARED, *VOCABULARIES[1 : len(weights)]))]
    ensemble = make_ensemble(engines, weights, unit="word")
    for seed in range(3):
        options = {"seed": seed, "max_tokens": 3 + 18 * seed, **OPTIONS[name]}
        expected = generated(ensemble, one_by_one, options, monkeypatch)
        for longest in (1, 3, MAX_UNVERIFIED):
            result = generated(ensemble, word_mixture(longest), options, monkeypatch)
            assert result[0] == expected[0]
            assert result[1] == pytest.approx(expected[1], abs=1e-9)
            assert longest > 1 or result[2] == expected[2]


def test_completions_written_together_are_those_written_alone(monkeypatch):
    ensemble, options = three(), {"seed": 3, "max_tokens": 30}
    alone = [generated(ensemble, one_by_one, {**options, "sequence": i}, monkeypatch)[0][0] for i in range(6)]
    assert generated(ensemble, word_mixture(), options, monkeypatch, ["ab"] * 6)[0] == alone


def wordy(seed: int):
    """Members whose words are two tokens long, and who agree on where they end."""
    firsts, seconds = (b" a", b" b", b" c"), (b"x", b"y")
    tokens = (*firsts, *seconds, b" ", b"a", b"b", b"c")

    def table(member: int):
        def logits(context):
            rng = np.random.default_rng([seed, member, *context[-2:]])
            allowed = np.array(
                [(context[-1] < 3 and token in seconds) or (context[-1] >= 3 and token in firsts) for token in tokens]
            )
            return np.where([*allowed, False, False], rng.normal(size=len(tokens) + 2), -np.inf)

        return logits

    return make_ensemble([ToyEngine(tokens, table(i)) for i in range(2)], [0.5, 0.5], unit="word")


@pytest.mark.slow
def test_a_word_that_has_ended_costs_nothing_to_find_out(monkeypatch):
    for seed in range(5):
        options = {"seed": seed, "max_tokens": 120}
        expected = generated(wordy(seed), one_by_one, options, monkeypatch)
        result = generated(wordy(seed), word_mixture(), options, monkeypatch)
        assert result[:2] == (expected[0], pytest.approx(expected[1]))
        assert expected[2] > 145
        assert result[2] <= 130


def test_engines_that_answer_place_by_place_are_not_guessed_about(monkeypatch):
    ensemble = wordy(0)
    for member in ensemble.members:
        member.engine.top_k_limit = len(member.engine.vocabulary.tokens)
    options = {"max_tokens": 60, "seed": 1, "top_k": 3}
    assert (
        generated(ensemble, word_mixture(), options, monkeypatch)[2]
        == generated(ensemble, one_by_one, options, monkeypatch)[2]
    )


def test_a_distribution_cut_to_symbols_that_begin_no_word_is_cut_again_without_them():
    first, two = fixed({b" ": 1.0}), fixed({b"a": 0.8, b" c": 0.12, b" ": 0.05, END: 0.03})
    ensemble = make_ensemble([first, two], [0, 1], unit="word")
    for options, expected in (
        ({"top_k": 1}, {b" c": 1.0}),
        ({"top_k": 2}, {b" c": 1.0}),
        ({"top_p": 0.5, "top_k": 0}, {b" c": 1.0}),
        ({"min_p": 0.3, "top_k": 0}, {b" c": 0.12 / 0.17, b" ": 0.05 / 0.17}),
        ({"top_k": 0}, {b" c": 0.6, b" ": 0.25, END: 0.15}),
    ):
        distribution = strategy_distribution(ensemble, {"temperature": 1.0, **options}, [(b"a", 0)])
        assert_same_distribution({data: p for (data, _), p in distribution.items()}, expected, 1e-6)
        assert {member for _, member in distribution} == {1}


def test_where_the_next_member_can_begin_no_word_the_symbol_stands():
    first, two = fixed({b" ": 0.5, b"a": 0.5}), fixed({b"a": 1.0})
    ensemble = make_ensemble([first, two], [0, 1], unit="word")
    distribution = strategy_distribution(ensemble, {"temperature": 1.0}, [(b"a", 0)])
    assert_same_distribution(distribution, {(b"a", 0): 0.5, (b" ", 0): 0.5}, 1e-6)


def test_engines_that_report_few_tokens_are_asked_for_those_that_begin_a_word():
    """The second member's two likeliest tokens continue a word; of those that begin one, a report has " c" alone."""
    tokens = (b"a", b"b", b" c", b" d", b"e")
    begins, continues = ({b" c": 0.5, b" d": 0.5}, {b"a": 0.5, b"b": 0.3, b" c": 0.12, b" d": 0.08})
    toys = [fixed(begins, tokens), fixed(continues, tokens)]
    whole = make_ensemble(toys, [0.5, 0.5], unit="word")
    few = make_ensemble([ReportingToy(toy, 3) for toy in toys], [0.5, 0.5], unit="word")
    settings = {"raw": True, "max_tokens": 4, "temperature": 1.0, "top_k": 2}
    for seed in range(25):
        expected, actual = (ensemble.generate("a", seed=seed, **settings).tokens for ensemble in (whole, few))
        assert [(token.data, token.member) for token in actual] == [(token.data, token.member) for token in expected]
    for symbols in ([2], [2, 0]):
        expected, actual = (reference(ensemble, settings).distribution(symbols) for ensemble in (whole, few))
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def reference(ensemble, options) -> ExactReference:
    settings = ensemble.settings(**options)
    return ExactReference(ensemble, settings, ensemble.encode_prompt("a", settings))


@pytest.mark.parametrize("unit", ["word", "byte"])
def test_engines_that_report_few_tokens_of_all_only_are_refused(unit):
    tokens = [b"a", b"b", b" c"]
    few = make_ensemble([ReportingToy(fixed({b"a": 0.5, b"b": 0.5}, tokens), 3, 4)] * 2, unit=unit)
    with pytest.raises(UnsupportedError, match=f"in the unit {unit} .*, and m0 runs in .* reports its 4 most likely"):
        few.generate("a", raw=True, max_tokens=2, top_k=2)


@pytest.mark.parametrize("method", ["conventional", "greedy", "speculative"])
def test_methods_that_need_an_average_are_refused_by_name(method):
    with pytest.raises(UnsupportedError, match=f"{method} does not work with the unit word") as caught:
        three().stream("hello", method=method)
    assert "--method mixture" in caught.value.hint


def test_an_ensemble_with_such_a_method_is_not_built():
    settings = three().defaults.with_options({"method": "greedy"})
    with pytest.raises(UnsupportedError, match="greedy does not work with the unit word"):
        three(defaults=settings)


@pytest.mark.parametrize("method", ["mixture", "single", "auto"])
def test_other_methods_write(method):
    completion = three().generate("ab", raw=True, method=method, seed=1, max_tokens=12)
    assert completion.tokens
    assert method != "single" or {token.member for token in completion.tokens} == {"m0"}


def test_a_member_alone_writes_what_it_writes_in_pieces():
    for seed in range(5):
        options = {"raw": True, "seed": seed, "max_tokens": 20}
        pair = [make_ensemble([engine(seed=2)], unit=unit).generate("ab", **options) for unit in ("word", "piece")]
        assert pair[0].text == pair[1].text
