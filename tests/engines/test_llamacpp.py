from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from contract import *  # noqa: F403
from contract import random_ids
from ggufs import write_tiny_gguf

pytest.importorskip("xllamacpp")

import mixlm
from mixlm.config import parse_config
from mixlm.core.sampling import softmax
from mixlm.engines import EngineSpec, load, runs_as_gguf
from mixlm.engines.base import Engine, LogitsRequest, Session
from mixlm.engines.llamacpp.engine import LlamaCppEngine
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.toy import ToyEngine
from mixlm.engines.transformers.engine import HFEngine
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import ConfigError, EngineError, ModelLoadError, ModelNotFoundError, TokenizerError, UnsupportedError
from mixlm.loading import load_config
from mixlm.models import find_gguf, tokenizer_folder
from mixlm.types import Message
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
    return Ensemble([MemberSpec(engine, "a"), MemberSpec(engine, "b")], [0.5, 0.5])


def distance(engine: Engine, exact: Engine, text: str) -> float:
    ids = engine.prompts.raw(text)
    assert ids.tolist() == exact.prompts.raw(text).tolist()
    wanted, actual = exact.session().logits(ids)[0], engine.session().logits(ids)[0]
    assert np.isfinite(actual).sum() >= engine.top_k_limit
    top = np.argsort(-wanted)[:20]
    return float(0.5 * np.abs(softmax(actual[top]) - softmax(wanted[top])).sum())


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
    with patch.object(engine.protocol, "request_bodies", lambda ids, count: bodies(ids, count)[1:]):
        other = session.logits(np.array([*ids, *ids]))
    expected = engine.session().logits(np.array([*ids, *ids]))
    assert ((other > -np.inf) == (expected > -np.inf)).all()
    np.testing.assert_allclose(softmax(other[0]), softmax(expected[0]), atol=1e-5)
    assert (usual != other).any()


def test_texts_are_equal_for_equal_seeds_and_for_the_conventional_way_of_one_member(engine):
    alone = Ensemble([MemberSpec(engine, "a")])
    replies = [alone.generate("three", seed=4, max_tokens=24, method=m, ignore_end=True, top_k=9) for m in METHODS]
    assert len({tuple(token.data for token in completion.tokens) for completion in replies}) == 1


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
        ({"method": "greedy"}, r"top_k is 0 \(off\)"),
        ({"method": "conventional", "mix_then_truncate": True}, r"top_k is 0 \(off\)"),
        ({"top_k": 64, "ignore_end": True}, "top_k is 64"),
    ],
)
def test_options_that_need_more_than_its_candidates_are_refused_before_anything_runs(ensemble, options, reason):
    with pytest.raises(UnsupportedError, match=f"{reason}.*64 most likely") as raised:
        ensemble.context(ensemble.settings(**options))
    assert "--engine hf" in str(raised.value)


@pytest.mark.parametrize("options", [{"top_k": 64}, {"top_k": 1}, {"method": "greedy", "top_k": 40}])
def test_options_that_its_candidates_are_enough_for_are_taken(ensemble, options):
    ensemble.context(ensemble.settings(**options))


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


def test_a_session_that_lost_its_slot_is_prefilled_again(engine):
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


def test_a_slot_is_given_back_when_its_session_is_gone():
    slots, one, other = Slots(2), Dummy(), Dummy()
    with slots.acquired(one) as (first, kept):
        assert not kept
    with slots.acquired(other) as (second, _):
        assert second != first
    del one
    gc.collect()
    third = Dummy()
    with slots.acquired(third) as (slot, kept):
        assert (slot, kept) == (first, False)
    with slots.acquired(other) as (slot, kept):
        assert (slot, kept) == (second, True)


def test_a_slot_in_use_is_waited_for():
    slots, one, other = Slots(1), Dummy(), Dummy()
    order = []

    def use() -> None:
        with slots.acquired(other):
            order.append("other")

    with slots.acquired(one):
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
    with pytest.raises(ModelNotFoundError, match=r"none stands behind 'smollm2-135m'.*mixlm models get"):
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
        LlamaCppEngine.from_file(spec(file), broken, tokenizer_folder(find_gguf(file)))


def test_a_tokenizer_of_another_model_is_refused(engine, file, tmp_path):
    from trained import trained
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=trained("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokens, and tiny.gguf has 260"):
        LlamaCppEngine.from_file(spec(file), Path(file), tmp_path)


def test_auto_takes_llama_cpp_where_it_is_enough(file):
    config = parse_config({"members": [{"model": file, "context": 64}]}, "here")
    assert isinstance(load_config(config, options={}).members[0].engine, LlamaCppEngine)
    assert isinstance(load_config(config).members[0].engine, HFEngine)


@pytest.mark.parametrize(
    ("member", "options"),
    [
        ({}, {"top_k": 0}),
        ({}, {"method": "greedy"}),
        ({}, {"repetition_penalty": 1.1}),
        ({}, {"top_k": 60, "ignore_end": True}),
        ({"dtype": "float32"}, {}),
        ({"device": "cuda"}, {}),
        ({"engine": "hf"}, {}),
        ({"candidates": 16}, {}),
    ],
)
def test_auto_takes_transformers_where_llama_cpp_is_not_enough(file, member, options, monkeypatch):
    taken = []
    monkeypatch.setattr("mixlm.loading.load_engine", lambda one: taken.append(one.engine) or ToyEngine())
    load_config(parse_config({"members": [{"model": file, **member}]}, "here"), options=options)
    assert taken[0] in ("auto", "hf")


REAL = ("smollm2-135m", "gemma-3-270m")


@pytest.fixture(scope="module")
def real() -> Iterator[list[str]]:
    """Paths of the demo models' files: the cache is the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MIXLM_CACHE")
        if USERS_CACHE:
            patch.setenv("MIXLM_CACHE", USERS_CACHE)
        if not all(runs_as_gguf(one) for one in REAL):
            pytest.skip("the GGUF files of the demo pair are not kept in the cache")
        yield list(REAL)


@pytest.mark.models
@pytest.mark.engines
def test_the_demo_models_are_those_of_transformers(real):
    # The file's weights are 4-bit numbers; llama.cpp rounds what they are multiplied with, transformers does not.
    for name in real:
        exact, one = load(EngineSpec(name, "", "float32")), load(spec(name, name=name, context=256, slots=1))
        assert one.vocabulary.end_ids == exact.vocabulary.end_ids
        assert one.prompts.chat([Message("user", "Hi <|im_end|> é½")]).tolist() == (
            exact.prompts.chat([Message("user", "Hi <|im_end|> é½")]).tolist()
        )
        assert max(distance(one, exact, text) for text in TEXTS) < 0.1


@pytest.mark.models
@pytest.mark.engines
def test_the_demo_pair_samples_the_exact_distribution(real):
    pair = mixlm.load(*real, engine="llamacpp", dtype="float32")
    report = check(pair, "Why is the sky blue?", samples=300)
    assert report.equal
    assert {one.left for one in report.comparisons} == {"mixture", "conventional", "single", "speculative"}
