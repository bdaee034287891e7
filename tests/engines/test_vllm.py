from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from vllm_cases import *  # noqa: F403
from vllm_cases import pair
from vllm_server import write_tiny_model

from mixlm.engines.contract import *  # noqa: F403

pytest.importorskip("vllm")
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine
from mixlm.engines.vllm.engine import VllmEngine
from mixlm.engines.vllm.engine_thread import VllmBackend, VllmOutput
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError, ModelLoadError, UnsupportedError

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore"),  # of vLLM's own
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return load(EngineSpec(str(folder), "tiny", "float32", engine="vllm", context=512))


@pytest.fixture(scope="module")
def exact(folder) -> Engine:
    return load(EngineSpec(str(folder), "tiny", "float32", engine="hf"))


def test_two_models_live_in_one_process(engine, exact, tmp_path):
    other = load(EngineSpec(str(write_tiny_model(tmp_path, seed=1)), "other", "float32", engine="vllm", context=64))
    assert other.batch_key != engine.batch_key
    ids = random_ids(engine, 12)  # noqa: F405
    assert engine.session().logits(ids)[0].argmax() == exact.session().logits(ids)[0].argmax()
    assert other.session().logits(ids)[0].argmax() != engine.session().logits(ids)[0].argmax()
    thread = other.thread
    del other
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_members_that_differ_in_prompts_share_one_model(engine):
    shared = engine.with_spec(EngineSpec(engine.name, "b", engine="vllm", system="Be brief."))
    assert shared.batch_key == engine.batch_key
    assert len(shared.prompts.chat([Message("user", "x")])) > len(engine.prompts.chat([Message("user", "x")]))  # noqa: F405


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, ConfigError, "device is 'tpu'"),
        ({"adapter": "somewhere"}, ConfigError, "has an adapter, and vLLM is given none"),
        ({"context": 100000}, ModelLoadError, "vLLM cannot load"),
    ],
)
def test_what_vllm_does_not_get_is_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        load(EngineSpec(str(folder), "tiny", "float32", engine="vllm", **options))


@pytest.mark.parametrize(("model", "message"), [("x.gguf", "is a GGUF file"), ("shape:qwen2.5-0.5b", "has no weights")])
def test_what_vllm_cannot_load_is_refused(model, message):
    with pytest.raises(UnsupportedError, match=message):
        load(EngineSpec(model, "", engine="vllm"))


def test_a_request_that_vllm_refuses_fails_alone(engine):
    with pytest.raises(EngineError, match="vLLM refuses"):
        engine.thread.submit(random_ids(engine, 5), {"max_tokens": 0}).result()  # noqa: F405
    engine.session().logits(random_ids(engine, 5))  # noqa: F405


class FailingBackend(VllmBackend):
    """vLLM, until it is told to fail."""

    is_broken = False

    def step(self) -> list[tuple[str, VllmOutput]]:
        if self.is_broken:
            raise RuntimeError("out of luck")
        return super().step()


def test_an_engine_that_fails_ends_the_generation_with_what_it_has(folder):
    backends: list[FailingBackend] = []

    def create(options: dict[str, Any]) -> FailingBackend:
        backends.append(FailingBackend(options))
        return backends[-1]

    spec = EngineSpec(str(folder), "tiny", "float32", engine="vllm", context=128)
    engine = VllmEngine(spec, str(folder), create)
    stream = pair(engine).stream("ab", raw=True, seed=1, max_tokens=30, ignore_end=True)
    first_tokens = [next(stream) for _ in range(5)]
    backends[0].is_broken = True
    with pytest.raises(GenerationInterruptedError, match="vLLM has stopped: out of luck") as raised:
        stream.finish()
    assert list(raised.value.completion.tokens[:5]) == first_tokens
    assert not engine.alive()
