"""Forward passes in fixed shapes return what the plain pass returns, whatever was requested before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_transformers_engine import build
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import mixlm
from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import assert_close, random_ids, uncached
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.transformers import cuda_graphs as steps
from mixlm.engines.transformers.cuda_graphs import FusedNorms
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.kv_cache import KVCache
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError

KINDS = ("llama", "mistral", "gemma3", "qwen2")  # mistral with a window of 8, gemma3 with one in every other layer
Load = Callable[..., HFEngine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, str] = {}

    def loaded(kind: str, graphs: str = "on", device: str = "cpu") -> HFEngine:
        if kind not in folders:
            folder = build(tmp_path_factory.mktemp(kind), "llama" if kind == "qwen2" else kind)
            if kind == "qwen2":
                torch.manual_seed(1)
                llama = AutoModelForCausalLM.from_pretrained(folder).config.to_dict()
                sizes = {k: v for k, v in llama.items() if k.endswith(("_size", "_heads", "_layers", "_id"))}
                Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.3)).save_pretrained(folder)
            folders[kind] = str(folder)
        return HFEngine.from_pretrained(EngineSpec(kind, kind, "float32", device, graphs=graphs), folders[kind])

    return loaded


@pytest.fixture(scope="module")
def load_once(load: Load) -> Load:
    """Loads an engine once for all tests that leave it as it is."""
    return cache(load)


@pytest.fixture(scope="module", params=["gemma3", "qwen2"])
def engine(request: pytest.FixtureRequest, load: Load) -> HFEngine:
    return load(request.param)


def many(length: int) -> Sequence[tuple[int, int, int]]:
    """What is asked in turn: how many tokens stand, how many are new, and of how many the logits are wanted."""
    return [
        (0, length, 1),
        (length, 1, 1),
        (length + 1, 3, 1),
        (length + 4, 5, 5),
        (length + 2, 6, 3),  # taken back, and others in their place
        (length, 33, 2),  # more than a step takes
        (length + 33, 32, 1),
        (length + 60, 9, 9),
        (3, 17, 4),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 240])
def test_fixed_shapes_return_what_the_plain_forward_returns(load_once: Load, kind: str, length: int) -> None:
    fixed, usual = load_once(kind), load_once(kind, "off")
    assert fixed.runner.graphs is not None
    assert usual.runner.graphs is None
    session, reference = fixed.session(), usual.session()
    ids = np.zeros(0, dtype=np.int64)
    for seed, (stand, new, last) in enumerate(many(length)):
        ids = np.concatenate([ids[:stand], random_ids(fixed, new, seed)])
        actual, expected = session.logits(ids, last), reference.logits(ids, last)
        np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())
        assert session.cache.length == len(ids)


@pytest.mark.slow
def test_fixed_shapes_return_what_transformers_returns(load_once: Load) -> None:
    engine = load_once("gemma3")
    ids = random_ids(engine, 40)
    reference = AutoModelForCausalLM.from_pretrained(engine.model.name_or_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()
    session = engine.session()
    ends = (6, 7, 20, 23, 31, 40)
    for begin, end in zip((0, *ends), ends, strict=False):
        assert_close(session.logits(ids[:end], end - begin), expected[begin:end])


def test_short_forwards_have_fixed_shapes_and_long_ones_do_not(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("llama")
    ran: list[tuple[int, int, int]] = []
    run = steps.FixedShapeForward.run

    def noted(self: steps.FixedShapeForward, room: Any) -> Any:
        ran.append((self.tokens, self.outputs, room.size))
        return run(self, room)

    monkeypatch.setattr(steps.FixedShapeForward, "run", noted)
    session, ids = engine.session(), random_ids(engine, 300)
    for end, last in ((40, 1), (41, 1), (44, 1), (50, 6), (53, 2), (255, 1), (256, 1), (257, 1)):
        session.logits(ids[:end], last)
    engine.respond([(session, LogitsRequest(0, ids[:258])), (engine.session(), LogitsRequest(0, ids[:5]))])
    assert ran == [(1, 1, 256), (4, 1, 256), (8, 8, 256), (4, 4, 256), (1, 1, 256), (1, 1, 512)]


@pytest.mark.slow
def test_a_sequence_goes_from_fixed_shapes_to_batches_and_back(load: Load) -> None:
    engine = load("gemma3")
    sessions = [engine.session(), engine.session()]
    texts = [random_ids(engine, 50, seed) for seed in (1, 2)]
    for end in (3, 4, 11, 12, 30, 50):
        sessions[0].logits(texts[0][: end - 1])
        requests = [(session, LogitsRequest(0, ids[:end], 2)) for session, ids in zip(sessions, texts, strict=True)]
        for actual, ids in zip(engine.respond(requests), texts, strict=True):
            assert_close(actual, uncached(engine, ids[:end], 2))


def test_what_a_buffer_held_before_is_not_attended_to(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("mistral")
    assert engine.runner.graphs is not None
    monkeypatch.setattr(engine.runner.graphs.pool, "_max_idle", 1)
    first = engine.session()
    first.logits(random_ids(engine, 20))
    room = first.cache.reserve(0)
    with torch.inference_mode():
        for keys, values in room.layers.values():
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
    del first
    assert room.idle
    second, ids = engine.session(), random_ids(engine, 5, 3)
    assert_close(second.logits(ids), uncached(load("mistral", "off"), ids))
    assert second.cache.reserve(0) is room
    assert not room.idle


def test_few_sequences_at_a_time_have_captured_forwards(load: Load) -> None:
    # Whether a room is to have steps is decided before anything is captured, so no device is needed to ask.
    ensemble = steps.CudaGraphRunner(load("llama").model, capture=True)
    caches = [KVCache(ensemble.pool) for _ in range(6)]
    assert [ensemble.fits(cache, 1) for cache in caches] == [True] * 4 + [False] * 2
    assert [ensemble.fits(cache, 33) for cache in caches] == [False] * 6
    del caches[0]
    assert [ensemble.fits(cache, 2) for cache in caches] == [True] * 4 + [False]  # the next in line takes its place
    assert ensemble.fits(KVCache(ensemble.pool), 1)  # in the room that was left, with what is captured there
    assert not ensemble.fits(caches[-1], 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture", "speculative", "conventional"])
def test_texts_do_not_depend_on_graphs(load_once: Load, method: Any) -> None:
    texts = []
    for graphs in ("on", "off"):
        pair = Ensemble([LoadedMember(load_once(kind, graphs), kind) for kind in ("qwen2", "llama")])
        texts.append([pair.generate("the river", method=method, max_tokens=60, seed=seed).text for seed in (1, 2)])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "count"), [("llama", 5), ("gemma3", 13)])  # gemma3 has six in a layer
def test_norms_are_fused_in_fixed_shapes_only(load_once: Load, kind: str, count: int, dtype: torch.dtype) -> None:
    model = copy.deepcopy(load_once(kind, "off").model).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.normal_()
    norms = FusedNorms(model)
    assert len(norms._norms) == count
    norm = model.model.norm
    x = torch.randn(3, norm.weight.numel(), dtype=dtype)
    with torch.inference_mode():
        usual = norm(x)
        with norms.applied():
            fused = norm(x)
            assert "forward" in vars(norm)
    torch.testing.assert_close(fused, usual)
    assert "forward" not in vars(norm)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.Module):
        eps = 1e-6

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + 0.1

    assert FusedNorms(torch.nn.Sequential(OddRMSNorm(), torch.nn.Linear(8, 8)))._norms == []


@pytest.mark.slow
def test_graphs_are_on_by_themselves_on_cuda_only_and_reported(load: Load) -> None:
    for graphs, said in (("auto", {}), ("off", {}), ("on", {"short forwards": "fixed shapes"})):
        engine = load("llama", graphs)
        assert {key: value for key, value in engine.details.items() if key == "short forwards"} == said


@pytest.mark.slow
def test_what_a_user_says_of_graphs_reaches_the_engine(load: Load, tmp_path: Path) -> None:
    folder, file = load("llama").model.name_or_path, tmp_path / "one.toml"
    file.write_text(f'[[members]]\nmodel = "{folder}"\ndtype = "float32"\ngraphs = "on"\n')
    loaded = (
        (mixlm.load(folder, dtype="float32", graphs="on"), True),
        (mixlm.load(file), True),
        (mixlm.load(file, graphs="off"), False),
    )
    for value, used in loaded:
        engine = value.members[0].engine
        assert isinstance(engine, HFEngine)
        assert (engine.runner.graphs is not None) == used


def test_another_adapter_has_graphs_of_its_own(load: Load) -> None:
    runner = load("llama").runner
    other = runner.with_adapter("some adapter")
    assert other.graphs is not None
    assert other.graphs is not runner.graphs
    assert other.graphs.pool is not runner.graphs.pool  # type: ignore[union-attr]
    assert runner.with_adapter("some adapter") is other


@pytest.mark.slow
def test_a_model_that_fixed_shapes_would_change_keeps_its_plain_forward(
    load: Load, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mamba = str(build(tmp_path / "m", "mamba"))
    for folder in (mamba, load("llama").model.name_or_path):
        monkeypatch.setattr(steps, "causal_mask", lambda positions, keys, _: torch.ones(len(positions), keys) > 0)
        with pytest.raises(UnsupportedError, match=r"tiny cannot run in fixed shapes .*graphs"):
            HFEngine.from_pretrained(EngineSpec("tiny", "tiny", "float32", "cpu", graphs="on"), folder)


class Recorded:
    """Stands for a CUDA graph on the CPU: replays the operations of a run, as they were, on their tensors."""

    replays = 0

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.out = run()
        self._again = make_fx(run)()

    def replay(self) -> None:
        Recorded.replays += 1
        self.out.copy_(self._again())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "qwen2"])
def test_recorded_forwards_return_what_the_plain_forward_returns(
    load: Load, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(run: Callable[[], torch.Tensor], *_: Any) -> tuple[Recorded, torch.Tensor]:
        recorded = Recorded(run)
        return recorded, recorded.out

    monkeypatch.setattr(steps, "warm_up", lambda run, _: run())
    monkeypatch.setattr(steps, "capture", captured)
    monkeypatch.setattr(Recorded, "replays", 0)
    graphed, usual = load(kind), load(kind, "off")
    graphed.runner.graphs = steps.CudaGraphRunner(graphed.model, capture=True)
    agree(graphed, usual)
    assert Recorded.replays > 30


def agree(fixed: HFEngine, usual: HFEngine) -> None:
    """Compare them over sessions that follow each other, so that rooms and what is recorded on them go on."""
    ids = np.zeros(0, dtype=np.int64)
    for begin in range(2):
        session, reference = fixed.session(), usual.session()
        for seed, (stand, new, last) in enumerate([*many(240)] * 3):
            ids = np.concatenate([ids[:stand], random_ids(fixed, new, 100 * begin + seed)])
            actual, expected = session.logits(ids, last), reference.logits(ids, last)
            np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("kind", KINDS)
def test_captured_fixed_shapes_return_what_the_plain_forward_returns(load: Load, kind: str) -> None:
    captured, usual = load(kind, "auto", "cuda"), load(kind, "off", "cuda")
    assert captured.details["short forwards"] == "captured graphs"
    agree(captured, usual)
    assert captured.runner.graphs is not None
    assert any(step._graph is not None for room in captured.runner.graphs.buffers for step in room.graphs.values())
