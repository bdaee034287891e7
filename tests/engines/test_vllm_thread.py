"""The thread that owns vLLM, and the engine in front of it, over a backend that needs no vLLM."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm_server import write_tiny_model

from mixlm.engines.base import EngineSpec
from mixlm.engines.requests import GenerateRequest, LogitsRequest
from mixlm.engines.vllm.engine import VllmEngine
from mixlm.engines.vllm.engine_thread import EngineThread, VllmOutput
from mixlm.errors import ConfigError, EngineError, ModelLoadError
from mixlm.types import Ids, Sampling

PROMPT = np.array([5, 6, 7])


class FakeBackend:
    """Continues a prompt with its last token plus 1, 2, …; every token has log-probability -1.

    added: names of requests. batches: how many requests each step ran. failure: raised by the next step. hold: steps
    wait for it.
    """

    def __init__(self, options: dict[str, Any] | None = None, size: int = 260) -> None:
        model = SimpleNamespace(get_vocab_size=lambda: size, max_model_len=128, dtype="torch.float32")
        self.config = SimpleNamespace(model_config=model, device_config=SimpleNamespace(device_type="cpu"))
        self.options = options
        self.added: list[tuple[Ids, dict[str, Any]]] = []
        self.batches: list[int] = []
        self.failure: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.is_closed = False
        self._waiting: dict[str, tuple[Ids, dict[str, Any]]] = {}

    def add(self, name: str, ids: Ids, parameters: dict[str, Any]) -> None:
        if parameters["max_tokens"] < 1:
            raise ValueError("max_tokens must be at least 1")
        self.added.append((ids, parameters))
        self._waiting[name] = (ids, parameters)

    def step(self) -> list[tuple[str, VllmOutput]]:
        self.hold.wait(10)
        if self.failure is not None:
            raise self.failure
        self.batches.append(len(self._waiting))
        outputs = []
        for name, (ids, parameters) in self._waiting.items():
            tokens = [int(ids[-1]) + i for i in range(1, parameters["max_tokens"] + 1)]
            top = dict.fromkeys(range(parameters["logprobs"]), -1.0)
            outputs.append((name, VllmOutput(tokens, [{**top, token: -1.0} for token in tokens])))
        self._waiting.clear()
        return outputs

    def close(self) -> None:
        self.is_closed = True


PARAMETERS = {"max_tokens": 2, "logprobs": 0}


def test_requests_that_wait_are_one_batch():
    backend = FakeBackend()
    thread = EngineThread(lambda: backend)
    backend.hold.clear()
    first = thread.submit(PROMPT, PARAMETERS)
    others = [thread.submit(PROMPT + i, PARAMETERS) for i in range(1, 4)]
    backend.hold.set()
    assert first.result(10).ids == [8, 9]
    assert [future.result(10).ids for future in others] == [[9, 10], [10, 11], [11, 12]]
    assert sum(backend.batches) == 4
    assert len(backend.batches) <= 2
    thread.close()
    thread.join(10)
    assert not thread.is_alive()
    assert backend.is_closed


def test_a_request_that_is_refused_fails_alone():
    thread = EngineThread(FakeBackend)
    refused, accepted = thread.submit(PROMPT, {**PARAMETERS, "max_tokens": 0}), thread.submit(PROMPT, PARAMETERS)
    with pytest.raises(EngineError, match="vLLM refuses: max_tokens must be at least 1"):
        refused.result(10)
    assert accepted.result(10).ids == [8, 9]
    thread.close()


def test_a_backend_that_fails_fails_what_waits_and_what_comes_later():
    backend = FakeBackend()
    thread = EngineThread(lambda: backend)
    backend.failure = RuntimeError("out of memory")
    with pytest.raises(EngineError, match="vLLM has stopped: out of memory"):
        thread.submit(PROMPT, PARAMETERS).result(10)
    thread.join(10)
    assert not thread.is_alive()
    assert not thread.alive
    with pytest.raises(EngineError, match="vLLM has stopped: out of memory"):
        thread.submit(PROMPT, PARAMETERS).result(10)


def test_a_thread_that_was_closed_takes_no_requests():
    thread = EngineThread(FakeBackend)
    thread.close()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(EngineError, match="vLLM has stopped: it was closed"):
        thread.submit(PROMPT, PARAMETERS).result(10)


def test_what_a_backend_raises_when_it_is_created_is_raised_here():
    def create() -> FakeBackend:
        raise ValueError("unknown architecture")

    with pytest.raises(ValueError, match="unknown architecture"):
        EngineThread(create)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def backends() -> list[FakeBackend]:
    return []


@pytest.fixture
def load(folder, backends):
    """Load the tiny model over a fake backend; options go to its spec."""

    def loaded(source: Path = folder, **options: Any) -> VllmEngine:
        def create(vllm_options: dict[str, Any]) -> FakeBackend:
            backends.append(FakeBackend(vllm_options))
            return backends[-1]

        return VllmEngine(EngineSpec(str(source), "tiny", "float32", engine="vllm", **options), str(source), create)

    return loaded


def test_a_generation_is_one_request_with_the_members_options(load, backends):
    engine = load()
    request = GenerateRequest(0, PROMPT, 5, Sampling(temperature=0.5, top_k=9), np.array([0, 1, 2, 40]), 3)
    [response] = engine.respond([(engine.session(), request)])
    assert (response.ids, response.logprobs) == ([8, 9, 10, 11, 12], [-1.0] * 5)
    ids, parameters = backends[0].added[-1]
    assert ids.tolist() == PROMPT.tolist()
    assert parameters["extra_args"] == {"mixlm_banned": "0-2,40"}
    names = ("max_tokens", "seed", "temperature", "top_k", "stop_token_ids")
    assert [parameters[name] for name in names] == [5, 3, 0.5, 9, sorted(engine.vocabulary.end_ids)]


def test_logits_are_requested_as_top_tokens(load, backends):
    engine = load(candidates=20)
    [logits] = engine.respond([(engine.session(), LogitsRequest(0, PROMPT))])
    assert backends[0].added[-1][1]["logprobs"] == 20 + engine.extra_tokens
    assert np.isfinite(logits[0]).sum() >= 20


def test_the_kv_cache_has_room_for_the_slots(load, backends):
    load(context=64, slots=3)
    options = backends[0].options
    # keys and values of 2 layers with 2 heads of 32 in float32, and a quarter more
    assert (options["max_model_len"], options["kv_cache_memory_bytes"]) == (64, 3 * 64 * (2 * 2 * 2 * 32 * 4 * 5 // 4))


def test_ends_of_text_are_those_of_the_generation_config_too(load, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    assert load().vocabulary.end_ids == {256}
    assert load(tmp_path / "model").vocabulary.end_ids == {256, 257}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"device": "tpu"}, ConfigError, "device is 'tpu'"), ({"adapter": "x"}, ConfigError, "has an adapter")],
)
def test_what_vllm_does_not_get_is_refused(load, options, error, message):
    with pytest.raises(error, match=message):
        load(**options)


def test_a_model_that_vllm_cannot_load_is_named(folder):
    def create(options: dict[str, Any]) -> FakeBackend:
        raise ValueError("unknown architecture")

    with pytest.raises(ModelLoadError, match="vLLM cannot load tiny: unknown architecture"):
        VllmEngine(EngineSpec(str(folder), "tiny", engine="vllm"), str(folder), create)


def test_an_engine_that_is_freed_stops_its_thread(load, backends):
    thread = load().thread
    thread.join(10)
    assert not thread.is_alive()
    assert backends[0].is_closed


def test_an_engine_on_the_same_weights_keeps_the_thread_and_has_ends_of_its_own(load, backends):
    template = "{% for message in messages %}{{ message.content }}<turn>{% endfor %}"
    shared = load().with_spec(EngineSpec("tiny", "other", engine="vllm", template=template))
    assert shared.thread.alive
    shared.thread.join(0.1)
    assert shared.thread.is_alive()
    assert shared.vocabulary.end_ids == {256, 257}
    assert shared.sampleable[[256, 257]].all()
    assert shared.with_spec(EngineSpec("tiny", "other", engine="vllm", adapter="x")) is None
    thread = shared.thread
    del shared
    thread.join(10)
    assert not thread.is_alive()
