from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import END, OPTIONS, WEIGHTS, assert_drawn_from, counted, driven, engine, ensemble, exact_law, toys, written

from mixlm.core.rng import Noise
from mixlm.decoding.engine_sampling import MAX_RUN
from mixlm.decoding.mixture import mixture
from mixlm.decoding.single import single
from mixlm.engines.base import GenerateRequest, GenerateResponse
from mixlm.engines.toy import ToyEngine, ToySession
from mixlm.ensemble import Ensemble
from mixlm.errors import EngineError, UnsupportedError
from mixlm.generation.scheduler import Scheduler
from mixlm.routing import FunctionRouter


def sampling_toys(unit: str, members: int) -> Ensemble:
    """An ensemble of `toys` whose engines sample themselves."""
    models = [member.engine for member in toys(unit, members).members]
    specials = 2
    engines = [ToyEngine(model.vocabulary.tokens[:-specials], model.table, samples_itself=True) for model in models]
    return ensemble(engines, WEIGHTS[:members], unit=unit)


def by_text(weights: np.ndarray) -> FunctionRouter:
    """Weights that change places behind an a: coins cannot be known ahead."""
    return FunctionRouter(lambda prompt, tail: weights[::-1] if tail[-1:] == b"a" else weights, len(weights))


def texts_law(those: Ensemble, options, length: int, router=None) -> dict[tuple[bytes, ...], float]:
    """The exact law of the first pieces of a reply, place by place."""
    law, open_texts = {}, {(): 1.0}
    for _ in range(length):
        longer = defaultdict(float)
        for pieces, mass in open_texts.items():
            weights = those.weights if router is None or b"".join(pieces)[-1:] != b"a" else those.weights[::-1]
            for piece, p in exact_law(those.with_weights(weights.tolist()), options, "ab", pieces).items():
                (law if piece == END else longer)[(*pieces, piece)] = mass * p
        open_texts = longer
    return law | open_texts


def pieces_of(those: Ensemble, options, length: int, sequence: int) -> tuple[bytes, ...]:
    reply = those.generate("ab", raw=True, seed=3, sequence=sequence, max_tokens=length, **options)
    found = tuple(token.data for token in reply.tokens)
    return (*found, END) if reply.finish_reason == "stop" else found


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("name", ["plain", "all but penalties"])
def test_texts_written_in_runs_follow_the_law(unit, name, routed):
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.03} if name != "plain" else OPTIONS[name]
    those = sampling_toys(unit, 3)
    router = by_text(those.weights) if routed else None
    one = Ensemble(those.members, WEIGHTS[:3], unit=unit, router=router)
    found = counted(lambda i: pieces_of(one, options, 3, i), 4000)
    assert_drawn_from(found, texts_law(those, options, 3, router))


def test_coins_that_fall_on_one_member_are_one_request():
    those = sampling_toys("token", 2)
    for position in range(60):
        noise = Noise(1, 0, position)
        coins = [noise.at(position + ahead).coin(those.weights) for ahead in range(9)]
        same = next((at for at, coin in enumerate(coins) if coin != coins[0]), 9)
        one = written(those, {}, "ab", [b"a"])
        flow = one.decode_step(mixture, noise, 9)
        [request] = next(flow)
        assert isinstance(request, GenerateRequest)
        assert (request.member, request.max_tokens) == (coins[0], same)
        flow.close()


def test_a_member_alone_is_asked_for_no_more_than_the_reply_or_a_reader_waits_for():
    those = sampling_toys("token", 2)
    for most, expected in ((1, 1), (5, 5), (1000, MAX_RUN)):
        flow = written(those, {}, "ab", []).decode_step(single(1), Noise(0), most)
        [request] = next(flow)
        assert request.max_tokens == expected
        flow.close()


def test_a_run_is_as_long_as_it_was_read_in_the_members_own_tokens():
    """Tokens that the text is not read in: a member that wrote them is asked anew behind them."""
    engines = [ToyEngine((b"a", b"b", b"ab"), lambda _: np.array([0.0, 0, -9, -99, -99]), samples_itself=True)]
    those = ensemble(engines, unit="piece")
    asked = []
    write = ToySession.generate

    def noted(self, run):
        asked.append(run.ids.tolist())
        return write(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToySession, "generate", noted)
        reply = those.generate("b", raw=True, seed=1, max_tokens=30, ignore_end=True, top_k=0)
    assert b"ab" in reply.text.encode()
    assert len(asked) > 4  # 2, were it not for the tokens
    begin = [3, 1]
    for ids in asked:
        text = b"".join((b"a", b"b", b"ab")[i] for i in ids[2:])
        assert ids == begin + engines[0].encoder.encode(text).ids
    assert reply.usage.members["m0"].tokens == 30


def test_usage_counts_a_forward_for_each_token_and_what_a_member_caught_up_with():
    those = sampling_toys("token", 2)
    usage = those.generate("ab", raw=True, seed=1, max_tokens=40, ignore_end=True).usage
    assert sum(one.forwards for one in usage.members.values()) == 40
    # Each reads the prompt and what was written before its last token, once: nothing is run twice.
    most = sum(one.prompt_tokens for one in usage.members.values()) + 2 * 40
    assert 40 < sum(one.forward_tokens for one in usage.members.values()) <= most


def test_log_probabilities_are_those_of_the_drawn_members_law():
    those = sampling_toys("token", 3)
    reply = those.generate("ab", raw=True, seed=4, max_tokens=12, ignore_end=True)
    written_before = []
    for token in reply.tokens:
        at = [one.name for one in those.members].index(token.member)
        alone = ensemble([those.members[at].engine])
        law = exact_law(alone, {}, "ab", written_before)
        total = 1 - law.get(END, 0.0)
        assert np.isclose(np.exp(token.logprob) * total, law[token.data], rtol=1e-6) or END in law
        written_before.append(token.data)


def test_equal_seeds_give_equal_texts_alone_and_together():
    those = sampling_toys("piece", 3)
    options = {"raw": True, "max_tokens": 20, "seed": 7}
    alone = [those.generate("ab", sequence=i, **options).text for i in range(5)]
    assert len(set(alone)) > 1
    scheduler, streams = Scheduler(3), [those.stream("ab", sequence=i, **options) for i in range(5)]
    for stream in streams:
        scheduler.add(stream)
    list(scheduler.run())
    assert [stream.completion.text for stream in streams] == alone


def test_penalties_and_other_methods_draw_here():
    those = sampling_toys("token", 2)
    for options in ({"repetition_penalty": 1.2}, {"method": "conventional"}, {"method": "auto"}):
        writer = those.context(those.settings(**options))
        assert not any(one.samples_itself for one in writer.members)
    assert all(one.samples_itself for one in those.context(those.settings()).members)
    by_word = ensemble([engine(samples_itself=True)], unit="word")
    assert not any(member.samples_itself for member in by_word.context(by_word.settings()).members)


def test_an_engine_that_draws_by_itself_needs_to_tell_nothing():
    those = sampling_toys("token", 2)
    for one in those.members:
        one.engine.top_k_limit = 3
    those.generate("ab", raw=True, max_tokens=3, top_k=0)
    with pytest.raises(UnsupportedError, match="reports its 3 most likely tokens only"):
        those.generate("ab", raw=True, max_tokens=3, top_k=0, method="conventional")


def test_a_token_that_may_not_be_drawn_is_never_written(monkeypatch):
    those = sampling_toys("token", 2)
    begin = those.members[0].engine.vocabulary.size - 2
    monkeypatch.setattr(ToySession, "generate", lambda self, run: GenerateResponse([begin], [-1.0]))
    with pytest.raises(EngineError, match=f"sampled the token {begin}, which is masked here"):
        driven(mixture, written(those, {}, "ab", []), those.weights, Noise(0))


def test_engines_that_write_no_runs_say_so():
    run = GenerateRequest(0, np.array([1]), 3, None, np.array([]), 0)
    with pytest.raises(UnsupportedError, match="does not sample tokens itself"):
        super(ToySession, engine().session()).generate(run)
