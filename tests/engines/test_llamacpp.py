from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from ggufs import write_tiny_gguf

from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids

pytest.importorskip("xllamacpp")

import mixlm
from mixlm.binding import LoadedMember
from mixlm.config import parse_config
from mixlm.core.sampling import softmax
from mixlm.engines import EngineSpec, load, runs_as_gguf
from mixlm.engines.base import Engine, Session
from mixlm.engines.llamacpp.engine import LlamaCppEngine
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.requests import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import (
    ConfigError,
    EngineError,
    ModelLoadError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedError,
    UsageError,
)
from mixlm.loading import choose_engine, load_config
from mixlm.models.gguf import find_gguf, tokenizer_folder
from mixlm.models.resolve import resolve
from mixlm.types import Message, TopKFilter
from mixlm.verification.check import check

USERS_CACHE = os.environ.get("MIXLM_CACHE")
TEXTS = ("The capital of France is", "Once upon a time there was a")


def spec(model: str, **options) -> EngineSpec:
    return EngineSpec(model, **{"name": "tiny", "engine": "llamacpp", "dtype": "float32", **options})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512))


@pytest.fixture(scope="module")
def engine(file) -> Engine:
    return load(spec(file, slots=3))


@pytest.fixture(scope="module")
def ensemble(engine) -> Ensemble:
    return Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")], [0.5, 0.5])


def distance(engine: Engine, exact: Engine, text: str) -> float:
    ids = engine.prompts.raw(text)
    assert ids.tolist() == exact.prompts.raw(text).tolist()
    wanted, actual = exact.session().logits(ids)[0], engine.session().logits(ids)[0]
    assert np.isfinite(actual).sum() >= engine.top_k_limit
    top = np.argsort(-wanted)[:20]
    return float(0.5 * np.abs(softmax(actual[top]) - softmax(wanted[top])).sum())


@pytest.mark.slow
def test_its_top_tokens_are_those_of_transformers(engine, file):
    # Keys and values are kept in 16 bits.
    exact = load(EngineSpec(file, "", "float32", engine="hf"))
    assert engine.vocabulary == exact.vocabulary
    assert max(distance(engine, exact, text) for text in TEXTS) < 0.002


def test_a_tokenizer_is_converted_once_and_without_the_weights(file, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    folder = tokenizer_folder(find_gguf(file))
    assert not list(folder.glob("*.safetensors"))
    monkeypatch.setattr("mixlm.models.gguf.write_tokenizer", lambda *_: pytest.fail("it was converted again"))
    assert tokenizer_folder(find_gguf(file)) == folder


def test_a_text_that_ends_in_half_a_character_has_logits(engine):
    ids = engine.encoder.encode("Smile: 😀 und Grüße 中文 ".encode() + "😀".encode()[:2]).ids
    assert np.isfinite(engine.session().logits(np.array(ids))).sum() >= engine.top_k_limit


def test_probabilities_that_are_missing_are_requested_another_way(engine):
    ids = random_ids(engine, 5)
    session = engine.session()
    usual = session.logits(ids).copy()
    bodies = engine.protocol.request_bodies
    with patch.object(engine.protocol, "request_bodies", lambda ids, count, among: bodies(ids, count)[1:]):
        other = session.logits(np.array([*ids, *ids]))
    expected = engine.session().logits(np.array([*ids, *ids]))
    assert ((other > -np.inf) == (expected > -np.inf)).all()
    np.testing.assert_allclose(softmax(other[0]), softmax(expected[0]), atol=1e-5)
    assert (usual != other).any()


@pytest.mark.slow
def test_texts_are_equal_for_equal_seeds_and_for_the_conventional_way_of_one_member(engine):
    alone = Ensemble([LoadedMember(engine, "a")])
    completions = [alone.generate("three", seed=4, max_tokens=24, method=m, ignore_end=True, top_k=9) for m in METHODS]
    assert len({tuple(token.data for token in completion.tokens) for completion in completions}) == 1


METHODS = ("mixture", "mixture", "conventional", "single")


def test_mixture_runs_one_member_a_token(ensemble):
    usage = ensemble.generate("Why is the sky blue?", seed=1, max_tokens=20, ignore_end=True).usage
    assert sum(member.forwards for member in usage.members.values()) == 20
    assert all(member.tokens for member in usage.members.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": 0}, r"top_k is 0 \(off\)"),
        ({"top_k": 65}, "top_k is 65"),
        ({"repetition_penalty": 1.2}, "repetition_penalty moves tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty moves tokens"),
        ({"rule": "mean-then-truncate", "repetition_penalty": 1.2}, "repetition_penalty moves tokens"),
        ({"top_k": 64, "ignore_end": True}, "top_k is 64"),
    ],
)
def test_options_that_need_more_than_its_candidates_are_refused_before_anything_runs(ensemble, options, reason):
    with pytest.raises(UnsupportedError, match=f"{reason}.*64 most likely") as raised:
        ensemble.context(ensemble.settings(**options))
    assert "engine='hf'" in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 64},
        {"top_k": 1},
        {"method": "greedy"},
        {"method": "greedy", "top_k": 40},
        {"rule": "mean-then-truncate"},
        {"rule": "min"},
    ],
)
def test_options_that_its_candidates_are_enough_for_are_taken(ensemble, options):
    ensemble.context(ensemble.settings(**options))


def test_rules_get_probabilities_in_the_whole_vocabulary_and_as_many_as_they_need(engine):
    ids, nothing = random_ids(engine, 5), np.zeros(0, dtype=np.int64)
    size = engine.vocabulary.size
    [whole] = engine.session().logits_rows(ids, 1, TopKFilter(size, nothing, normalized=True))
    assert abs(np.exp(whole.logprobs).sum() - 1) < 1e-4
    session = engine.session()
    session.logits(ids)  # what was requested without a filter has fewer
    for count in (8, 80):
        [report] = session.logits_rows(ids, 1, TopKFilter(count, nothing, normalized=True))
        assert len(report.ids) == count
        order = np.isin(whole.ids, report.ids)
        np.testing.assert_allclose(report.logprobs, whole.logprobs[order], atol=1e-4)
        assert whole.logprobs[~order].max() < report.logprobs.min() + 1e-6


def test_rules_that_truncate_what_they_combine_are_sampled(ensemble):
    plain = {"temperature": 0.8, "top_k": 0}
    for options in ({"rule": "mean-then-temper", **plain}, {"rule": "union-top-k"}, {"rule": "min", **plain}):
        assert len(ensemble.generate("three", seed=1, max_tokens=6, ignore_end=True, **options).tokens) == 6


def test_log_probabilities_of_given_texts_are_refused(engine):
    with pytest.raises(UnsupportedError, match=r"log-probability of a given text.*64 most likely"):
        engine.session().token_logprobs(random_ids(engine, 5))


def test_more_tokens_are_requested_while_too_few_may_be_sampled(engine, monkeypatch):
    ids = random_ids(engine, 4)
    first = np.isfinite(engine.session().logits(ids)[0])
    sampleable = engine.sampleable.copy()
    sampleable[np.flatnonzero(first)[:30]] = False
    monkeypatch.setattr(engine, "sampleable", sampleable)
    more = np.isfinite(engine.session().logits(ids)[0])
    assert (more & sampleable).sum() >= engine.top_k_limit
    assert (more & first).sum() == first.sum()


@pytest.mark.slow
def test_a_session_that_lost_its_slot_is_prefilled_again(engine):
    gc.collect()  # sessions of other tests that still hold a slot
    sessions = [engine.session() for _ in range(4)]
    texts = [random_ids(engine, 6, seed) for seed in range(4)]
    for session, ids in zip(sessions, texts, strict=True):
        session.logits(ids[:5])
    actual = sessions[0].logits(texts[0])
    np.testing.assert_array_equal(actual, engine.session().logits(texts[0]))
    assert [(forward.tokens, forward.cached) for forward in sessions[0].stats.forwards] == [(5, 0), (6, 0)]
    sessions[3].logits(texts[3])
    assert sessions[3].stats.forwards[-1].cached == 5


def test_several_sequences_are_served_at_once_and_in_order(engine):
    texts = [random_ids(engine, 4 + seed, seed) for seed in range(5)]
    requests = [(engine.session(), LogitsRequest(0, ids)) for ids in texts]
    for row, ids in zip(engine.respond(requests), texts, strict=True):
        expected = engine.session().logits(ids)
        assert row[0].argmax() == expected[0].argmax()
        np.testing.assert_allclose(softmax(row[0]), softmax(expected[0]), atol=1e-4)


class Dummy:
    """Something that can hold a slot."""

    num_cached = 0


@pytest.mark.slow
def test_a_slot_is_given_back_when_its_session_is_gone():
    slots, session, other = Slots(2), Dummy(), Dummy()
    with slots.acquired(session) as (first, kept_ids):
        assert not kept_ids
    with slots.acquired(other) as (second, _):
        assert second != first
    del session
    gc.collect()
    third = Dummy()
    with slots.acquired(third) as (slot, kept_ids):
        assert (slot, kept_ids) == (first, False)
    with slots.acquired(other) as (slot, kept_ids):
        assert (slot, kept_ids) == (second, True)


def test_the_shortest_text_loses_its_slot_and_a_long_one_is_not_evicted_while_a_short_one_is_busy():
    slots, sessions = Slots(2), [Dummy() for _ in range(3)]
    for session, length in zip(sessions, (5000, 30, 0), strict=True):
        session.num_cached = length
    long, short = (slots.acquire(session) for session in sessions[:2])
    slots.release(long[0])
    assert slots.acquire(sessions[2]) is None
    slots.release(short[0])
    assert slots.acquire(sessions[2]) == (short[0], False)
    assert slots.acquire(sessions[0]) == (long[0], True)


def test_a_slot_in_use_is_waited_for():
    slots, session, other = Slots(1), Dummy(), Dummy()
    order = []

    def use() -> None:
        with slots.acquired(other):
            order.append("other")

    with slots.acquired(session):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(0.05)
        order.append("one")
    thread.join()
    assert order == ["one", "other"]


def test_an_unusable_response_is_an_error_that_quotes_it(engine, monkeypatch):
    class Broken:
        def handle_completions(self, request):
            return {"error": {"code": 500, "message": "out of luck"}}

    session: Session = engine.session()
    monkeypatch.setattr(engine, "server", Broken())
    with pytest.raises(EngineError, match="out of luck"):
        session.logits(random_ids(engine, 3))


def test_a_model_without_gguf_file_is_refused_with_what_to_do():
    with pytest.raises(ModelNotFoundError, match=r"there is none for 'smollm2-135m'.*mixlm models get"):
        load(spec("smollm2-135m"))
    assert not runs_as_gguf("smollm2-135m")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dtype": "bfloat16"}, ConfigError, "in the types that the file has"),
        ({"device": "cuda"}, ConfigError, "on the CPU only"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(file, options, error, said):
    with pytest.raises(error, match=said):
        load(spec(file, **options))


def test_a_file_that_llama_cpp_cannot_load_is_named(engine, file, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(file).read_bytes().replace(b"llama", b"limma"))
    with pytest.raises(ModelLoadError, match=r"llama.cpp cannot load .*broken.gguf"):
        LlamaCppEngine(spec(file), broken, tokenizer_folder(find_gguf(file)))


def test_a_tokenizer_of_another_model_is_refused(engine, file, tmp_path):
    from trained import trained
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=trained("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokens, and tiny.gguf has 260"):
        LlamaCppEngine(spec(file), Path(file), tmp_path)


def chosen(model: str, **member: object) -> str:
    [config] = parse_config({"members": [{"model": model, **member}]}, "here").members
    return choose_engine(config)


def test_auto_is_llama_cpp_for_gguf_files(file):
    assert chosen(file) == "llamacpp"
    assert isinstance(mixlm.load(file).members[0].engine, LlamaCppEngine)


def test_auto_is_transformers_where_llama_cpp_is_not_installed(file, monkeypatch):
    monkeypatch.setattr("mixlm.engines.registry.find_spec", lambda name: None)
    assert chosen(file) == "auto"


@pytest.mark.parametrize("member", [{"dtype": "float32"}, {"candidates": 16}, {"sampling": {"top_k": 0}}])
def test_no_option_changes_the_engine_of_auto(file, member):
    assert chosen(file, **member) == "llamacpp"


@pytest.mark.slow
def test_a_converted_model_is_no_gguf_file(file):
    converted = resolve(file, "float32")
    assert chosen(file) == "llamacpp"
    assert chosen(converted.path_or_id) == "auto"
    assert chosen(Path(converted.path_or_id).name) == "auto"


@pytest.mark.parametrize(
    ("member", "options"),
    [
        ({}, {"top_k": 0}),
        ({}, {"top_k": 100}),
        ({}, {"repetition_penalty": 1.1}),
        ({}, {"logit_bias": {"a": 1.0}}),
        ({}, {"score_prompt": True, "raw": True, "max_tokens": 0}),
        ({"dtype": "bfloat16"}, {}),
        ({"device": "cuda"}, {}),
        ({"graphs": "on"}, {}),
        ({"adapter": "somewhere"}, {}),
    ],
)
def test_an_option_that_llama_cpp_cannot_compute_is_refused_with_the_remedy(file, member, options):
    with pytest.raises(UsageError, match="engine='hf'"):
        load_config(parse_config({"members": [{"model": file, **member}]}, "here")).generate("hi", **options)


def test_a_router_by_prompt_is_refused_before_anything_is_loaded(file, monkeypatch):
    monkeypatch.setattr("mixlm.loading.load_engine", None)
    with pytest.raises(UnsupportedError, match=r"router by prompt needs every token's probability.*engine='hf'"):
        load_config(parse_config({"members": [{"model": file}], "router": {"kind": "prompt"}}, "here"))


@pytest.mark.slow
def test_every_method_writes_the_text_of_one_engine(file):
    pair = mixlm.load(file, file, dtype="float32")
    options = {"seed": 3, "max_tokens": 12, "ignore_end": True, "top_k": 40}
    text = pair.generate("hi", **options).text
    assert pair.generate("hi", method="speculative", draft="lookup", **options).text == text
    assert pair.generate("hi", method="auto", **options).text == text
    assert pair.generate(["hi", "ho"], **options)[0].text == text


REAL = ("smollm2-135m", "gemma-3-270m")


@pytest.fixture(scope="module")
def real() -> Iterator[list[str]]:
    """Paths of the demo models' files: the cache is the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MIXLM_CACHE")
        if USERS_CACHE:
            patch.setenv("MIXLM_CACHE", USERS_CACHE)
        if not all(runs_as_gguf(model) for model in REAL):
            pytest.skip("the GGUF files of the demo pair are not kept in the cache")
        yield list(REAL)


@pytest.mark.models
@pytest.mark.engines
def test_the_demo_models_are_those_of_transformers(real):
    # The file's weights are 4-bit numbers; llama.cpp rounds what they are multiplied with, transformers does not.
    for name in real:
        exact, loaded = load(EngineSpec(name, "", "float32")), load(spec(name, name=name, context=256, slots=1))
        assert loaded.vocabulary.end_ids == exact.vocabulary.end_ids
        assert loaded.prompts.chat([Message("user", "Hi <|im_end|> é½")]).tolist() == (
            exact.prompts.chat([Message("user", "Hi <|im_end|> é½")]).tolist()
        )
        assert max(distance(loaded, exact, text) for text in TEXTS) < 0.1


@pytest.mark.models
@pytest.mark.engines
def test_the_demo_pair_samples_the_exact_distribution(real):
    pair = mixlm.load(*real, engine="llamacpp", dtype="float32")
    report = check(pair, "Why is the sky blue?", samples=300)
    assert report.equal
    assert {comparison.left for comparison in report.comparisons} == {
        "mixture",
        "conventional",
        "single",
        "speculative",
    }
