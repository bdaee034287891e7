from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    WEIGHTS,
    assert_sampled_from,
    counted,
    driven,
    engine,
    exact_distribution,
    make_ensemble,
    toys,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.mixture import MAX_RUN, mixture
from mixlm.decoding.single import single
from mixlm.engines.requests import GenerateRequest, GenerateResponse
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
    return make_ensemble(engines, WEIGHTS[:members], unit=unit)


def by_text(weights: np.ndarray) -> FunctionRouter:
    """Weights that change places behind an a: coins cannot be known ahead."""
    return FunctionRouter(lambda prompt, tail: weights[::-1] if tail[-1:] == b"a" else weights, len(weights))


def texts_distribution(ensemble: Ensemble, options, length: int, router=None) -> dict[tuple[bytes, ...], float]:
    """The exact distribution of the first pieces of a completion, place by place."""
    distribution, open_texts = {}, {(): 1.0}
    for _ in range(length):
        longer = defaultdict(float)
        for pieces, mass in open_texts.items():
            weights = ensemble.weights if router is None or b"".join(pieces)[-1:] != b"a" else ensemble.weights[::-1]
            for piece, p in exact_distribution(ensemble.with_weights(weights.tolist()), options, "ab", pieces).items():
                (distribution if piece == END else longer)[(*pieces, piece)] = mass * p
        open_texts = longer
    return distribution | open_texts


def pieces_of(ensemble: Ensemble, options, length: int, sequence: int) -> tuple[bytes, ...]:
    completion = ensemble.generate("ab", raw=True, seed=3, sequence=sequence, max_tokens=length, **options)
    pieces = tuple(token.data for token in completion.tokens)
    return (*pieces, END) if completion.finish_reason == "stop" else pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "name", "routed"),
    [
        ("token", "plain", False),
        ("piece", "plain", True),
        ("token", "all but penalties", True),
        ("piece", "all but penalties", False),
    ],
)
def test_texts_written_in_runs_follow_the_distribution(unit, name, routed):
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.03} if name != "plain" else OPTIONS[name]
    weights = [0.8, 0.1, 0.1]  # so different that a router that is ignored is found
    ensemble = sampling_toys(unit, 3).with_weights(weights)
    router = by_text(ensemble.weights) if routed else None
    sampled = Ensemble(ensemble.members, weights, unit=unit, router=router)
    frequencies = counted(lambda i: pieces_of(sampled, options, 3, i), 1000)
    assert_sampled_from(frequencies, texts_distribution(ensemble, options, 3, router))


def test_coins_that_fall_on_one_member_are_one_request():
    ensemble = sampling_toys("token", 2)
    for position in range(60):
        noise = Noise(1, 0, position)
        coins = [noise.at(position + ahead).coin(ensemble.weights) for ahead in range(9)]
        same = next((i for i, coin in enumerate(coins) if coin != coins[0]), 9)
        written_text = written(ensemble, {}, "ab", [b"a"])
        flow = written_text.decode_step(mixture, noise, 9)
        [request] = next(flow)
        assert isinstance(request, GenerateRequest)
        assert (request.member, request.max_tokens) == (coins[0], same)
        flow.close()


def test_a_member_alone_is_asked_for_no_more_than_the_completion_or_a_reader_waits_for():
    ensemble = sampling_toys("token", 2)
    for length, expected in ((1, 1), (5, 5), (1000, MAX_RUN)):
        flow = written(ensemble, {}, "ab", []).decode_step(single(1, mixture), Noise(0), length)
        [request] = next(flow)
        assert request.max_tokens == expected
        flow.close()


def test_a_run_is_as_long_as_it_was_read_in_the_members_own_tokens():
    """Tokens that the text is not read in: a member that wrote them is asked anew behind them."""
    engines = [ToyEngine((b"a", b"b", b"ab"), lambda _: np.array([0.0, 0, -9, -99, -99]), samples_itself=True)]
    ensemble = make_ensemble(engines, unit="piece")
    requests = []
    write = ToySession.generate

    def noted(self, run):
        requests.append(run.ids.tolist())
        return write(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToySession, "generate", noted)
        completion = ensemble.generate("b", raw=True, seed=1, max_tokens=30, ignore_end=True, top_k=0)
    assert b"ab" in completion.text.encode()
    assert len(requests) > 4  # 2, were it not for the tokens
    begin = [3, 1]
    for ids in requests:
        text = b"".join((b"a", b"b", b"ab")[i] for i in ids[2:])
        assert ids == begin + engines[0].encoder.encode(text).ids
    assert completion.usage.members["m0"].tokens == 30


def test_usage_counts_a_forward_for_each_token_and_what_a_member_caught_up_with():
    ensemble = sampling_toys("token", 2)
    usage = ensemble.generate("ab", raw=True, seed=1, max_tokens=40, ignore_end=True).usage
    assert sum(member.forwards for member in usage.members.values()) == 40
    # Each reads the prompt and what was written before its last token, once: nothing is run twice.
    limit = sum(member.prompt_tokens for member in usage.members.values()) + 2 * 40
    assert 40 < sum(member.forward_tokens for member in usage.members.values()) <= limit


def test_log_probabilities_are_those_of_the_sampled_members_distribution():
    ensemble = sampling_toys("token", 3)
    completion = ensemble.generate("ab", raw=True, seed=4, max_tokens=12, ignore_end=True)
    written_before = []
    for token in completion.tokens:
        index = [member.name for member in ensemble.members].index(token.member)
        alone = make_ensemble([ensemble.members[index].engine])
        distribution = exact_distribution(alone, {}, "ab", written_before)
        total = 1 - distribution.get(END, 0.0)
        assert np.isclose(np.exp(token.logprob) * total, distribution[token.data], rtol=1e-6) or END in distribution
        written_before.append(token.data)


def test_equal_seeds_give_equal_texts_alone_and_together():
    ensemble = sampling_toys("piece", 3)
    options = {"raw": True, "max_tokens": 20, "seed": 7}
    alone = [ensemble.generate("ab", sequence=i, **options).text for i in range(5)]
    assert len(set(alone)) > 1
    scheduler, streams = Scheduler(3), [ensemble.stream("ab", sequence=i, **options) for i in range(5)]
    for stream in streams:
        scheduler.add(stream)
    list(scheduler.run())
    assert [stream.completion.text for stream in streams] == alone


def test_penalties_and_other_methods_sample_in_mixlm():
    ensemble = sampling_toys("token", 2)
    for options in ({"repetition_penalty": 1.2}, {"method": "conventional"}, {"method": "auto"}):
        writer = ensemble.context(ensemble.settings(**options))
        assert not any(member.samples_itself for member in writer.members)
    assert all(member.samples_itself for member in ensemble.context(ensemble.settings()).members)
    by_word = make_ensemble([engine(samples_itself=True)], unit="word")
    assert not any(member.samples_itself for member in by_word.context(by_word.settings()).members)


def test_an_engine_that_samples_itself_reports_nothing_else():
    ensemble = sampling_toys("token", 2)
    for member in ensemble.members:
        member.engine.top_k_limit = 3
    ensemble.generate("ab", raw=True, max_tokens=3, top_k=0)
    with pytest.raises(UnsupportedError, match="reports its 3 most likely tokens only"):
        ensemble.generate("ab", raw=True, max_tokens=3, top_k=0, method="conventional")


def test_a_token_that_may_not_be_sampled_is_never_written(monkeypatch):
    ensemble = sampling_toys("token", 2)
    begin = ensemble.members[0].engine.vocabulary.size - 2
    monkeypatch.setattr(ToySession, "generate", lambda self, run: GenerateResponse([begin], [-1.0]))
    with pytest.raises(EngineError, match=f"sampled the token {begin}, which is masked here"):
        driven(mixture, written(ensemble, {}, "ab", []), ensemble.weights, Noise(0))


def test_engines_that_write_no_runs_say_so():
    run = GenerateRequest(0, np.array([1]), 3, None, np.array([]), 0)
    with pytest.raises(UnsupportedError, match="does not sample tokens itself"):
        super(ToySession, engine().session()).generate(run)
