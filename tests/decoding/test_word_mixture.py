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
    assert_drawn_from,
    assert_same_law,
    counted,
    driven,
    engine,
    ensemble,
    fixed,
    member_law,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.word_mixture import MAX_UNVERIFIED, word_mixture
from mixlm.engines.base import SampleRequest, SampleResponse
from mixlm.engines.toy import ToyEngine
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import Choice
from mixlm.types import Sampling
from mixlm.units.word import begins_word

WEIGHTS = [0.5, 0.2, 0.3]


def three(**options: Any):
    """Three members of different vocabularies; symbols that begin words are likely enough to be seen."""
    engines = [engine(tokens, seed=20 + i) for i, tokens in enumerate((SHARED, *VOCABULARIES[1:3]))]
    return ensemble(engines, WEIGHTS, unit="word", **options)


def plain_laws(those, options, prompt: str, text: bytes, without=lambda _: False) -> list[dict[bytes, float]]:
    """Each member's law over byte strings behind a text."""
    out = []
    for one in those.members:
        reply = one.engine.encoder.encode(text).ids if text else []
        sampling = Sampling(**{**one.sampling, **options})
        out.append(member_law(one.engine, sampling, one.engine.prompts.raw(prompt).tolist(), reply, without))
    return out


def begins(data: bytes, text: bytes) -> bool:
    return data == END or begins_word(data, text)


def definition(those, options, prompt: str, path) -> dict[tuple[bytes, int], float]:
    """The law of the next symbol and its writer behind a path of such, by the definition in words."""
    text = b"".join(data for data, _ in path)
    laws = plain_laws(those, options, prompt, text)
    if not path:
        return {
            (u, i): w * p for i, (w, law) in enumerate(zip(those.weights, laws, strict=True)) for u, p in law.items()
        }
    owner = path[-1][1]
    out = {(u, owner): p for u, p in laws[owner].items() if not begins(u, text)}
    ended = 1 - sum(out.values())
    only = plain_laws(those, options, prompt, text, lambda u: not begins(u, text))
    for i, (weight, law) in enumerate(zip(those.weights, laws, strict=True)):
        first = {u: p for u, p in law.items() if begins(u, text)} or only[i]
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
    """Every outcome of a strategy at one place, with its probability: all coins, all draws."""
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
    [drawn] = yield [SampleRequest(z, view.ids(), view.sampler(step.noise))]
    begun = state.word_start_marker()
    if z == coin or not begun(np.array([drawn.symbol]))[0]:
        return [Choice(drawn.symbol, z, drawn.logprob)]

    def beginning(logits):
        law = following.bind_distribution()
        symbols, logprobs = law(logits)
        if not begun(symbols).any():
            others = (following.member.symbols < 0) | ~begun(following.member.symbols)
            if not np.isfinite(logits[~others]).any():
                return None
            symbols, logprobs = law(np.where(others, -np.inf, logits))
        kept = begun(symbols) & np.isfinite(logprobs)
        symbols, logprobs = symbols[kept], logprobs[kept]
        logprobs = logprobs - np.logaddexp.reduce(logprobs)
        at = step.noise.next_round().sample(symbols, logprobs)
        return SampleResponse(int(symbols[at]), float(logprobs[at]))

    [anew] = yield [SampleRequest(coin, following.ids(), beginning)]
    return [Choice(drawn.symbol, z, drawn.logprob) if anew is None else Choice(anew.symbol, coin, anew.logprob)]


def at(those, options, path):
    """A text that stands behind a path of symbols and their writers."""
    writing = written(those, options, "ab", [])
    for data, member in path:
        tokens = those.members[member].engine.vocabulary.tokens
        writing.state.append(int(those.unit.symbols(member)[tokens.index(data)]))
    return writing


def strategy_law(those, options, path, longest: int = MAX_UNVERIFIED) -> dict[tuple[bytes, int], float]:
    law = defaultdict(float)
    for choice, probability in enumerated(
        lambda: word_mixture(longest), lambda: at(those, options, path), those.weights
    ):
        if probability == 0:
            continue
        data = END if choice.symbol == those.unit.end else those.unit.symbol_bytes(choice.symbol)
        assert data == END or those.unit.owner(choice.symbol) == choice.member
        law[data, choice.member] += probability
    return dict(law)


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
def test_the_law_over_coins_and_draws_is_the_definition(path, name, longest):
    options = OPTIONS[name]
    found = strategy_law(three(), options, path, longest)
    assert_same_law(found, definition(three(), options, "ab", path), 1e-9)


def texts(law, length: int) -> dict[tuple[bytes, ...], float]:
    """The law over the first symbols, from the law of the next."""
    out = defaultdict(float)

    def go(path, probability: float) -> None:
        if len(path) == length or (path and path[-1][0] == END):
            out[tuple(data for data, _ in path)] += probability
            return
        for step, p in law(path).items():
            go((*path, step), probability * p)

    go((), 1.0)
    return dict(out)


def small():
    return ensemble(
        [engine((b"a", b" ", b" b", b"b"), seed=3), engine((b" ", b"b", b"a"), seed=4)], [0.6, 0.4], unit="word"
    )


def test_the_law_over_whole_texts_is_the_mixture_of_words():
    """Word by word: who writes one is drawn by weight, and writes it as it would alone, given that one begins."""
    those, options = small(), {"temperature": 1.0, "top_k": 0}
    length = 4

    def spelled(member: int, before: bytes, word: tuple[bytes, ...], *, first: bool) -> float:
        """The probability that a member's word begins with these symbols."""
        probability, text = 1.0, before
        for number, data in enumerate(word):
            law = plain_laws(those, options, "ab", text)[member]
            if number == 0 and not first:
                probability /= sum(p for u, p in law.items() if begins(u, text))
            probability *= law.get(data, 0.0)
            text += data
        return probability

    def ends(member: int, text: bytes) -> float:
        return sum(p for u, p in plain_laws(those, options, "ab", text)[member].items() if begins(u, text))

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
                for member, weight in enumerate(those.weights)
            )
            text = after
        return probability

    found = texts(lambda path: strategy_law(those, options, path), length)
    assert sum(found.values()) == pytest.approx(1)
    assert_same_law(found, {pieces: whole(pieces) for pieces in found}, 1e-9)


def test_replies_follow_the_law():
    those, options = small(), {"temperature": 1.0, "top_k": 0}
    law = texts(partial(definition, those, options, "ab"), 3)

    def reply(sequence: int) -> tuple[bytes, ...]:
        done = those.generate("ab", raw=True, seed=5, sequence=sequence, max_tokens=3, **options)
        return (*(one.data for one in done.tokens), *([END] if done.finish_reason == "stop" else []))

    assert_drawn_from(counted(reply, 5000), law)


def test_the_second_draw_does_not_follow_from_the_first():
    """End-of-text is one symbol for all members: with the same noise, the first member's win would favour it."""
    one, two = fixed({b"a": 0.9, END: 0.1}), fixed({b" ": 0.7, END: 0.3})
    those = ensemble([one, two], [1e-9, 1], unit="word")
    for longest in (1, MAX_UNVERIFIED):
        counts = defaultdict(int)
        for sequence in range(2500):
            choice, _ = driven(word_mixture(longest), at_plain(those, [(b"a", 0)]), those.weights, Noise(1, sequence))
            counts[END if choice.symbol == those.unit.end else those.unit.symbol_bytes(choice.symbol)] += 1
        assert_drawn_from(counts, {b"a": 0.9, b" ": 0.07, END: 0.03})


def at_plain(those, path):
    return at(those, {"temperature": 1.0, "top_k": 0}, path)


def test_who_goes_on_with_a_word_is_asked_alone_and_a_switch_asks_one_more():
    those = three()
    switched = set()
    for position in range(200):
        writing = at(those, {}, [(b"a", 0)])
        noise = Noise(1, 0, position)
        coin = noise.coin(those.weights)
        choice, rounds = driven(word_mixture(1), writing, those.weights, noise)
        asked = [one.member for [one] in rounds]
        begun = choice.symbol == those.unit.end or begins_word(those.unit.symbol_bytes(choice.symbol), b"a")
        assert asked == ([0, coin] if begun and coin != 0 else [0])
        assert choice.member == asked[-1]
        switched.add(len(asked))
    assert switched == {1, 2}


def replied(those, strategy, options, monkeypatch, prompts="ab"):
    """What a strategy writes: symbols, members, log-probabilities and why it ended; and the forwards it took."""
    monkeypatch.setattr("mixlm.decoding.word_mixture.build", lambda options, context: strategy)
    found = those.generate(prompts, raw=True, **options)
    found = found if isinstance(found, list) else [found]
    texts = [([(t.data, t.member) for t in one.tokens], one.finish_reason) for one in found]
    logprobs = [t.logprob for one in found for t in one.tokens]
    return texts, logprobs, sum(m.forwards for one in found for m in one.usage.members.values())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.5, 0.2, 0.3), (0.1, 0.1, 0.8)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_text_is_the_same_whenever_the_ends_of_words_are_looked_at(name, weights, monkeypatch):
    engines = [engine(tokens, seed=20 + i) for i, tokens in enumerate((SHARED, *VOCABULARIES[1 : len(weights)]))]
    those = ensemble(engines, weights, unit="word")
    for seed in range(6):
        options = {"seed": seed, "max_tokens": 3 + 9 * seed, **OPTIONS[name]}
        expected = replied(those, one_by_one, options, monkeypatch)
        for longest in (1, 3, MAX_UNVERIFIED):
            found = replied(those, word_mixture(longest), options, monkeypatch)
            assert found[0] == expected[0]
            assert found[1] == pytest.approx(expected[1], abs=1e-9)
            assert longest > 1 or found[2] == expected[2]


def test_replies_written_together_are_those_written_alone(monkeypatch):
    those, options = three(), {"seed": 3, "max_tokens": 30}
    alone = [replied(those, one_by_one, {**options, "sequence": i}, monkeypatch)[0][0] for i in range(6)]
    assert replied(those, word_mixture(), options, monkeypatch, ["ab"] * 6)[0] == alone


def wordy(seed: int):
    """Members whose words are two tokens long, and who agree on where they end."""
    firsts, seconds = (b" a", b" b", b" c"), (b"x", b"y")
    tokens = (*firsts, *seconds, b" ", b"a", b"b", b"c")

    def table(member: int):
        def logits(context):
            rng = np.random.default_rng([seed, member, *context[-2:]])
            allowed = np.array(
                [(context[-1] < 3 and one in seconds) or (context[-1] >= 3 and one in firsts) for one in tokens]
            )
            return np.where([*allowed, False, False], rng.normal(size=len(tokens) + 2), -np.inf)

        return logits

    return ensemble([ToyEngine(tokens, table(i)) for i in range(2)], [0.5, 0.5], unit="word")


def test_a_word_that_has_ended_costs_nothing_to_find_out(monkeypatch):
    for seed in range(5):
        options = {"seed": seed, "max_tokens": 120}
        expected = replied(wordy(seed), one_by_one, options, monkeypatch)
        found = replied(wordy(seed), word_mixture(), options, monkeypatch)
        assert found[:2] == (expected[0], pytest.approx(expected[1]))
        assert expected[2] > 145
        assert found[2] <= 130


def test_engines_that_answer_place_by_place_are_not_guessed_about(monkeypatch):
    those = wordy(0)
    for one in those.members:
        one.engine.top_k_limit = len(one.engine.vocabulary.tokens)
    options = {"max_tokens": 60, "seed": 1, "top_k": 3}
    assert (
        replied(those, word_mixture(), options, monkeypatch)[2] == replied(those, one_by_one, options, monkeypatch)[2]
    )


def test_a_law_cut_to_symbols_that_begin_no_word_is_cut_again_without_them():
    one, two = fixed({b" ": 1.0}), fixed({b"a": 0.8, b" c": 0.12, b" ": 0.05, END: 0.03})
    those = ensemble([one, two], [0, 1], unit="word")
    for options, expected in (
        ({"top_k": 1}, {b" c": 1.0}),
        ({"top_k": 2}, {b" c": 1.0}),
        ({"top_p": 0.5, "top_k": 0}, {b" c": 1.0}),
        ({"min_p": 0.3, "top_k": 0}, {b" c": 0.12 / 0.17, b" ": 0.05 / 0.17}),
        ({"top_k": 0}, {b" c": 0.6, b" ": 0.25, END: 0.15}),
    ):
        law = strategy_law(those, {"temperature": 1.0, **options}, [(b"a", 0)])
        assert_same_law({data: p for (data, _), p in law.items()}, expected, 1e-6)
        assert {member for _, member in law} == {1}


def test_where_the_next_member_can_begin_no_word_the_symbol_stands():
    one, two = fixed({b" ": 0.5, b"a": 0.5}), fixed({b"a": 1.0})
    those = ensemble([one, two], [0, 1], unit="word")
    law = strategy_law(those, {"temperature": 1.0}, [(b"a", 0)])
    assert_same_law(law, {(b"a", 0): 0.5, (b" ", 0): 0.5}, 1e-6)


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
    reply = three().generate("ab", raw=True, method=method, seed=1, max_tokens=12)
    assert reply.tokens
    assert method != "single" or {one.member for one in reply.tokens} == {"m0"}


def test_a_member_alone_writes_what_it_writes_in_pieces():
    for seed in range(5):
        options = {"raw": True, "seed": seed, "max_tokens": 20}
        pair = [ensemble([engine(seed=2)], unit=unit).generate("ab", **options) for unit in ("word", "piece")]
        assert pair[0].text == pair[1].text
