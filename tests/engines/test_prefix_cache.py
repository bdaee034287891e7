"""Texts that ended, or are being read, are taken by sequences that begin alike; and no text changes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_transformers_engine import build, load

import mixlm
from mixlm.engines.contract import random_ids
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.kv_cache import KVCache, Segment
from mixlm.engines.transformers.prefix_cache import MIN_TOKENS, PrefixCache
from mixlm.types import MemberUsage

KINDS = ["llama", "gemma3", "unbatched", "mamba", "qwen3_next"]


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-3)  # wrong ones differ by 1 and more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    built = {}

    def make(kind: str) -> Path:
        if kind not in built:
            built[kind] = build(tmp_path_factory.mktemp(kind), kind)
        return built[kind]

    return make


@pytest.fixture(scope="module")
def engines(folder):
    """Return an engine with a prefix cache, emptied, and one without, of a kind."""
    loaded: dict[str, tuple[HFEngine, HFEngine]] = {}

    def get(kind: str) -> tuple[HFEngine, HFEngine]:
        if kind not in loaded:
            with pytest.MonkeyPatch.context() as patch:
                if kind == "unbatched":
                    patch.setattr("mixlm.engines.transformers.attention.register", lambda model: False)
                path = folder("gemma3" if kind == "unbatched" else kind)
                loaded[kind] = load(path, prefix_cache=64), load(path, prefix_cache=0)
        loaded[kind][0].drop_prefixes()
        return loaded[kind]

    return get


def size_of(engine: HFEngine) -> int:
    return sum(engine.prefix_cache_parts.values())


def forwards(session) -> list[tuple[int, int]]:
    return [(forward.tokens, forward.cached) for forward in session.stats.forwards]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_sequence_runs_what_the_first_has_not(engines, kind):
    engine, plain = engines(kind)
    ids = random_ids(engine, 90)
    other = np.concatenate([ids[:60], random_ids(engine, 30, 7)])
    first, second, third = (engine.session() for _ in range(3))
    assert_near(first.logits(ids[:60]), plain.session().logits(ids[:60]))
    assert second.cached_tokens(ids[:60]) == 59
    assert_near(second.logits(ids[:60]), plain.session().logits(ids[:60]))  # the first is still there
    assert forwards(second) == [(1, 59)]
    assert second.stats.cached_tokens == 59
    assert_near(first.logits(ids), plain.session().logits(ids))
    first.close()
    shared = 60 if engine.runner.least_cached(90) <= 60 else 0  # anew where each token takes a pass
    assert_near(third.logits(other), plain.session().logits(other))
    assert forwards(third) == [(90 - shared, shared)]
    assert third.stats.cached_tokens == shared
    fourth, other = engine.session(), np.concatenate([ids[:50], random_ids(engine, 9, 8)])
    assert_near(fourth.logits(other), plain.session().logits(other))
    # A state is known at the ends of what was read only, not within.
    assert fourth.stats.cached_tokens == (50 if engine.runner.path.name in ("PACKED", "CROPPED") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_turn_reads_what_was_said_once(engines, kind):
    engine, plain = engines(kind)
    ids = random_ids(engine, 80)
    session = engine.session()
    for end in range(40, 61):
        session.logits(ids[:end])
    del session  # ended without `close`
    later = engine.session()
    assert_near(later.logits(ids[:70], 3), plain.session().logits(ids[:70], 3))
    [(tokens, cached)] = forwards(later)
    assert 40 <= cached <= 60
    assert tokens + cached == 70
    if engine.runner.path.name in ("PACKED", "CROPPED"):
        assert cached == 60


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_take_the_same_text_do_not_change_each_others(engines, kind):
    engine, plain = engines(kind)
    rng = np.random.default_rng(5)
    common = random_ids(engine, 40)
    sessions = [engine.session() for _ in range(4)]
    texts = [common[: int(rng.integers(20, 40))] for _ in sessions]
    for turn in range(8):
        i = int(rng.integers(4))
        if turn % 3 == 2:
            texts[i] = texts[i][: int(rng.integers(1, len(texts[i])))]
            if turn == 5:
                sessions[i].close()
        texts[i] = np.concatenate([texts[i], random_ids(engine, int(rng.integers(1, 24)), turn)])
        last = int(rng.integers(1, 4))
        assert_near(sessions[i].logits(texts[i], last), plain.session().logits(texts[i], last))
    if engine.runner.path.name in ("PACKED", "CROPPED"):  # where any beginning can be taken
        assert sum(session.stats.cached_tokens for session in sessions) > 20


@pytest.mark.parametrize("kind", ["llama", "unbatched", "qwen3_next"])
def test_one_step_of_many_sequences_runs_their_common_text_once(engines, kind):
    engine, plain = engines(kind)
    prompt = random_ids(engine, 64)
    ends = [random_ids(engine, length, length) for length in (0, 0, 3, 5, 0, 2)]
    texts = [np.concatenate([prompt, end]) for end in ends] + [random_ids(engine, 30, 77)]
    sessions = [engine.session() for _ in texts]
    requests = [(session, LogitsRequest(0, ids)) for session, ids in zip(sessions, texts, strict=True)]
    for ids, rows in zip(texts, engine.respond(requests), strict=True):
        assert_near(rows, plain.session().logits(ids))
    tokens = [session.stats.tokens for session in sessions]
    assert tokens[0] == 64
    assert sum(tokens[1:6]) <= 5 + 10 + 5  # each runs its own, and at most two of the prompt
    assert tokens[6] == 30


def test_a_session_with_several_requests_in_one_step_serves_them_in_turn(engines):
    engine, plain = engines("llama")
    ids = random_ids(engine, 50)
    first, second = engine.session(), engine.session()
    steps = [(first, ids[:40]), (second, ids[:45]), (second, ids[:20]), (first, ids[:50])]
    outputs = engine.respond([(session, LogitsRequest(0, text)) for session, text in steps])
    for (_, text), rows in zip(steps, outputs, strict=True):
        assert_near(rows, plain.session().logits(text))
    assert second.stats.cached_tokens == 40


@pytest.mark.slow
def test_the_memory_is_bounded_and_the_least_recently_used_text_goes_first(folder):
    engine = load(folder("llama"), prefix_cache=1)
    prefixes = engine.runner.prefixes
    assert prefixes is not None
    assert engine.details["prefix cache"] == "up to 1 MiB"
    per_token = 2 * 2 * 16 * 4  # layers, keys and values, numbers, bytes
    length = 1500
    assert 2 * length * per_token < prefixes.max_bytes < 3 * length * per_token
    texts = [random_ids(engine, length, seed) for seed in range(3)]
    for i, ids in enumerate(texts):
        engine.session().logits(ids)
        assert size_of(engine) == min(i + 1, 2) * length * per_token
        if i == 1:
            engine.session().logits(texts[0])  # used again
    assert [engine.session().cached_tokens(ids) for ids in texts] == [length - 1, 0, length - 1]
    engine.session().logits(random_ids(engine, 5000 - 1000, 9)[: engine.context_length])
    assert size_of(engine) <= prefixes.max_bytes
    engine.drop_prefixes()
    assert size_of(engine) == 0
    assert engine.session().cached_tokens(texts[0]) == 0


def test_no_memory_means_no_cache(folder):
    engine = load(folder("llama"), prefix_cache=0)
    ids = random_ids(engine, 40)
    engine.session().logits(ids)
    assert engine.session().cached_tokens(ids) == size_of(engine) == 0
    assert "prefix cache" not in engine.details


def test_texts_that_are_being_read_in_other_threads_stay_right(engines):
    engine, plain = engines("llama")
    prefixes = engine.runner.prefixes
    assert prefixes is not None
    common = random_ids(engine, 60)
    texts = [np.concatenate([common[: 20 + 5 * i], random_ids(engine, 20, i)]) for i in range(8)]
    expected = [plain.session().logits(ids) for ids in texts]
    results: list[list[np.ndarray]] = [[] for _ in texts]

    def read(i: int) -> None:
        for turn in range(3):
            session = engine.session()
            session.logits(texts[(i + turn) % 8][:30])
            results[i].append(session.logits(texts[i]))
            if turn == 1:
                prefixes.clear()
            session.close()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rows, row in zip(results, expected, strict=True):
        assert len(rows) == 3
        for actual in rows:
            assert_near(actual, row)


def test_no_text_is_copied_while_another_thread_runs_the_model(engines, monkeypatch):
    engine, plain = engines("llama")
    ids, copying, rows = random_ids(engine, 60), threading.Event(), []
    engine.session().logits(ids[:40])
    load_segments = KVCache.load

    def noted(*arguments):
        copying.set()
        load_segments(*arguments)

    monkeypatch.setattr(KVCache, "load", noted)
    thread = threading.Thread(target=lambda: rows.append(engine.session().logits(ids)))
    with engine.loaded.lock:
        thread.start()
        assert not copying.wait(0.1)
    thread.join(60)
    assert copying.is_set()
    assert_near(rows[0], plain.session().logits(ids))


def test_an_interrupted_forward_leaves_nothing_wrong_behind(engines, monkeypatch):
    engine, plain = engines("llama")
    ids = random_ids(engine, 60)
    session = engine.session()
    session.logits(ids[:20])

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.model.model.layers[1], "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            session.logits(ids)
    session.close()
    assert engine.session().cached_tokens(ids) == 20
    assert_near(engine.session().logits(ids), plain.session().logits(ids))


@pytest.mark.parametrize("kind", ["llama", "unbatched", "mamba", "qwen3_next"])
def test_what_is_kept_goes_before_memory_runs_out(engines, monkeypatch, kind):
    engine, plain = engines(kind)
    ids = random_ids(engine, 43)
    last_layer = next(part for part in engine.model.modules() if isinstance(part, torch.nn.ModuleList))[-1]
    forward, sizes = last_layer.forward, []

    def short(*arguments, **options):  # when the layers before it have written into the KV cache
        sizes.append(size_of(engine))
        if sizes[-1]:
            raise torch.OutOfMemoryError("x")
        return forward(*arguments, **options)

    for length in (40, 0):  # behind a text, and from its beginning
        session = engine.session()
        if length:
            session.logits(ids[:length])
        engine.session().logits(random_ids(engine, 30, 7))
        sizes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(last_layer, "forward", short)
            actual = session.logits(ids, 2)
        assert [size > 0 for size in sizes[:2]] == [True, False]
        assert_near(actual, plain.session().logits(ids, 2))
        engine.drop_prefixes()


@pytest.mark.parametrize("name", ["load", "copy_segment"])
def test_memory_that_runs_out_for_a_copy_empties_what_is_kept_and_changes_no_text(engines, monkeypatch, name):
    engine, plain = engines("llama")
    ids = random_ids(engine, 60)
    engine.session().logits(ids[:40])
    assert size_of(engine) > 0

    def fail(*_):
        raise torch.OutOfMemoryError("x")

    with monkeypatch.context() as patched:
        patched.setattr(KVCache, name, fail)
        session = engine.session()
        assert_near(session.logits(ids), plain.session().logits(ids))
        assert session.stats.cached_tokens == (0 if name == "load" else 39 + 1)
        if name == "copy_segment":
            assert size_of(engine) == 0
    assert_near(engine.session().logits(ids), plain.session().logits(ids))


def test_a_sequence_keeps_its_own_text_where_there_is_no_memory_for_a_longer_one(engines, monkeypatch):
    engine, plain = engines("llama")
    ids, session = random_ids(engine, 60), engine.session()
    session.logits(ids[:20])
    engine.session().logits(ids[:50])

    def fail(*_):
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(KVCache, "load", fail)
    assert_near(session.logits(ids), plain.session().logits(ids))
    assert forwards(session) == [(20, 0), (40, 20)]


def test_each_adapter_and_each_regime_has_texts_of_its_own():
    prefixes = PrefixCache(1 << 20)
    cache = KVCache()
    cache.append(0, torch.ones(1, 32, 4), torch.ones(1, 32, 4))
    cache.length = 32
    ids = np.arange(32)
    prefixes.insert(("a", None), ids, cache)
    assert prefixes.match(("a", None), ids, has_state=False) == 32
    assert prefixes.match((None, None), ids, has_state=False) == 0
    assert prefixes.load(("b", None), ids, KVCache()) == 0


def test_the_tree_keeps_common_tokens_once_and_finds_any_prefix():
    """Against a plain list of texts."""
    rng = np.random.default_rng(0)
    prefixes, texts = PrefixCache(1 << 30), []
    for _ in range(40):
        base = texts[int(rng.integers(len(texts)))] if texts and rng.random() < 0.8 else np.zeros(0, dtype=np.int64)
        ids = np.concatenate([base[: int(rng.integers(len(base) + 1))], rng.integers(0, 3, int(rng.integers(20, 60)))])
        cache = KVCache()
        tokens = torch.from_numpy(np.cumsum(ids)).float()[None, :, None]  # depends on all before it
        cache.append(0, tokens, -tokens)
        cache.length = len(ids)
        prefixes.insert("key", ids, cache)
        texts.append(ids)
        wanted = np.concatenate([texts[int(rng.integers(len(texts)))][: int(rng.integers(60))], rng.integers(0, 3, 5)])
        taken = KVCache()
        length = prefixes.load("key", wanted, taken)
        longest = max(int((np.cumprod(t[: len(wanted)] == wanted[: len(t)])).sum()) for t in texts)
        assert longest - MIN_TOKENS < length <= longest
        assert taken.length == length
        if length:
            keys, values = taken.reserve(0).layers[0]
            np.testing.assert_array_equal(keys[0, :length, 0].numpy(), np.cumsum(wanted[:length]))
            np.testing.assert_array_equal(values[0, :length, 0].numpy(), -np.cumsum(wanted[:length]))
    distinct = {tuple(ids[:end]) for ids in texts for end in range(1, len(ids) + 1)}
    assert prefixes.nbytes <= 8 * len(distinct)


def test_a_segment_is_cut_as_views_and_has_a_state_behind_its_last_token_only():
    keys = torch.arange(5.0)[None, :, None]
    segment = Segment(5, {0: (keys, keys)}, "state", 7)
    assert segment.nbytes == 47
    head, tail = segment.cut(0, 2), segment.cut(2, 5)
    assert (head.tokens, head.state, head.nbytes) == (2, None, 16)
    assert (tail.tokens, tail.state, tail.state_bytes) == (3, "state", 7)
    assert Segment(5, {}, "state").cut(0, 4).state is None  # also of a model with nothing but states


@pytest.mark.slow
def test_texts_are_the_same_with_and_without_and_a_prompt_of_many_is_read_once(folder):
    def texts(size: int) -> tuple[list[str], list[dict[str, MemberUsage]]]:
        folders = [str(folder(kind)) for kind in ("llama", "gemma3")]
        ensemble = mixlm.load(*folders, dtype="float32", device="cpu", engine="hf", prefix_cache=size, top_k=20)
        prompt = "the river and of in " * 12
        options = {"max_tokens": 8, "seed": 3}
        cancelled = ensemble.stream(prompt + "why", **options)
        next(cancelled)
        cancelled.release()
        completions = ensemble.generate([prompt] * 5 + [prompt + "why", "the"], **options)
        stream = ensemble.stream(prompt, **options)
        next(stream)
        del stream  # left alone
        turn = [{"role": "user", "content": prompt}]
        for _ in range(3):
            completions.append(ensemble.generate(turn, **options))
            turn += [{"role": "assistant", "content": completions[-1].text}, {"role": "user", "content": "in the"}]
        return [completion.text for completion in completions], [c.usage.members for c in completions]

    plain, without = texts(0)
    shared, usages = texts(64)
    assert shared == plain
    assert not any(usage.cached_tokens for members in without for usage in members.values())
    for name in usages[0]:
        length = usages[0][name].prompt_tokens
        assert sum(members[name].forward_tokens for members in usages[:5]) < 1.2 * length + 5 * 8 * 3
        readers = [members[name] for members in usages[:6] if members[name].forwards]
        assert sum(usage.cached_tokens < 0.8 * length for usage in readers) <= 1 < len(readers)
    later = [usage for members in usages[8:] for usage in members.values() if usage.forwards]
    assert all(usage.cached_tokens > 0.5 * usage.prompt_tokens for usage in later)
    assert later
