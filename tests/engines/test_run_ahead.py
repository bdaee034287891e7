"""Running ahead of requests: a session returns what it would have returned without."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_graphs import KINDS, Load, Recorded, load  # noqa: F401
from test_device_topk import random_case
from toys import toys

from mixlm.binding import LoadedMember
from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.decoding import mixture
from mixlm.engines.base import Session
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids, uncached
from mixlm.engines.requests import LogitsRequest, RunAheadHint, SampleRequest
from mixlm.engines.transformers import cuda_graphs as steps
from mixlm.engines.transformers import run_ahead as ahead
from mixlm.engines.transformers import runner
from mixlm.engines.transformers.device_topk import DeviceTopK, from_device, is_worthwhile
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.run_ahead import DEPTH, DeviceSampler
from mixlm.ensemble import Ensemble
from mixlm.routing import FunctionRouter
from mixlm.types import Candidates, Sampling

TRUNCATED = {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8}


@pytest.fixture(scope="module")
def engine(load: Load) -> HFEngine:  # noqa: F811
    return load("gemma3")


@pytest.fixture(scope="module")
def load_once(load: Load) -> Load:  # noqa: F811
    """Loads an engine once for all tests that leave it as it is."""
    return cache(load)


def sampled_twice(seed: int, device: str = "cpu") -> tuple[int, int] | None:
    """What the device and the host draw from a random row; None for a row that comes whole."""
    logits, transform = random_case(seed)
    cut, noise = transform.top_k_filter, Noise(seed, 3, 5)
    if cut is None or not is_worthwhile(cut, len(logits)):
        return None
    symbols = np.random.default_rng(seed).permutation(len(logits)) + 7
    draws = DeviceSampler(DeviceTopK())
    part = draws.top_k.select(logits[None].to(device), cut, [0])[0]
    row = from_device(part.cpu().numpy(), cut)
    if row is None:
        return None
    hint = RunAheadHint((noise.sample_key,), transform.sampling, symbols)
    distribution = transform(row)
    return int(draws.sample(part, cut, hint, noise.sample_key)), int(
        distribution.ids[noise.sample(symbols[distribution.ids], distribution.logprobs)]
    )


@pytest.mark.slow
def test_the_device_samples_what_the_host_samples() -> None:
    both = [actual for seed in range(600) if (actual := sampled_twice(seed)) is not None]
    assert len(both) > 150
    assert [device for device, _ in both] == [host for _, host in both]


@pytest.mark.parametrize("key", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_noise_is_the_same_number_for_number(key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "sample_key", key)
    symbols = np.arange(300_000)
    actual = ahead.gumbel((torch.from_numpy(symbols) + 1) * ahead._GOLDEN, key)
    np.testing.assert_allclose(actual.numpy(), Noise(0).gumbel(symbols), rtol=1e-13, atol=1e-13)


def test_equal_logits_are_truncated_where_the_host_truncates_them() -> None:
    logits = torch.tensor([1.0] * 4 + [3.0] * 6 + [2.0] * 5 + [0.0] * 100)[torch.randperm(115)]
    for p in np.linspace(0.02, 0.99, 60):
        transform = Transform(Sampling(top_k=14, top_p=float(p)), np.array([3, 20]))
        assert transform.top_k_filter is not None
        part = DeviceTopK().select(logits[None], transform.top_k_filter, [0])[0]
        ids, values = ahead.truncate_sorted(part[0].view(torch.float32), part[1], 14, transform.sampling)
        assert sorted(ids[values > -np.inf].tolist()) == sorted(transform(logits.numpy()).ids.tolist())


class Log:
    """The forwards that sessions answered with, and those that nobody asked for."""

    def __init__(self, sessions: list[Session]) -> None:
        works = [session.stats for session in sessions]
        self.forwards = sum(len(stats.forwards) for stats in works)
        self.ahead = sum(stats.run_ahead for stats in works)
        self.vain = sum(stats.wasted for stats in works)


def write(ensemble: Ensemble, **options: Any) -> tuple[list[tuple[bytes, str]], str, Log]:
    """A completion's pieces and who wrote them, why it ended, and what its sessions did."""
    stream = ensemble.stream("the river", **options)
    tokens = [(token.data, token.member) for token in stream]
    stream.release()
    return tokens, stream.completion.finish_reason, Log(list(stream.sessions))


def pair(load: Load, graphs: str, kinds: tuple[str, str], *, device: str = "cpu", **options: Any) -> Ensemble:  # noqa: F811
    members = [LoadedMember(load(kind, graphs, device), kind) for kind in kinds]
    return Ensemble(members, **{"weights": [0.7, 0.3], **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "method", "unit"),
    [
        (("llama", "qwen2"), "mixture", "token"),
        (("llama", "qwen2"), "single", "piece"),
        (("gemma3", "mistral"), "mixture", "piece"),
        (("gemma3", "mistral"), "single", "token"),
    ],
)
def test_texts_are_those_of_one_forward_at_a_time(
    load_once: Load,
    kinds: tuple[str, str],
    method: str,
    unit: Any,
) -> None:
    for weights in ([0.9, 0.1], [0.5, 0.5])[: 1 if method == "single" else 2]:
        fixed, usual = (pair(load_once, graphs, kinds, weights=weights, unit=unit) for graphs in ("on", "off"))
        for seed, more in enumerate([{}, TRUNCATED, {"stop": []}, {"top_k": 300}, {"top_k": 0}]):
            options = {"method": method, "seed": seed, "max_tokens": 50, **more}
            if "stop" in more:  # something that is written
                options["stop"] = [usual.generate("the river", **options).text[20:22]]
            actual, expected = write(fixed, **options), write(usual, **options)
            assert actual[:2] == expected[:2]
            assert actual[1] == "stop" or "stop" not in more
            assert actual[2].forwards == expected[2].forwards
            assert expected[2].ahead == expected[2].vain == 0
            if len(actual[0]) > 5:
                assert (actual[2].ahead > 0) == (more.get("top_k") not in (0, 300))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture", "single"])
def test_all_of_a_run_but_its_first_is_run_ahead(load_once: Load, method: str) -> None:
    fixed = pair(load_once, "on", ("llama", "qwen2"), unit="token")
    tokens, _, log = write(fixed, method=method, seed=1, max_tokens=300, ignore_end=True)
    assert len(tokens) == log.forwards == 300  # more than a room's least size
    inside = sum(token[1] == other[1] for token, other in pairwise(tokens))
    assert inside - 2 <= log.ahead <= inside  # a member's sequence moves to a larger room once
    assert log.vain == 0


@pytest.mark.slow
def test_what_is_wasted_is_bounded(load_once: Load) -> None:
    fixed = pair(load_once, "on", ("llama", "gemma3"), unit="piece")  # texts at random are hardly ever read as written
    tokens, _, log = write(fixed, seed=1, max_tokens=200, ignore_end=True)
    runs = sum(token[1] == other[1] for token, other in pairwise(tokens))
    assert 0 < log.vain <= DEPTH * (runs - log.ahead)
    ended = write(pair(load_once, "on", ("llama", "qwen2"), unit="token"), method="single", seed=2, stop=["e"])
    assert ended[1] == "stop"
    assert ended[2].ahead == len(ended[0]) - 1
    assert ended[2].vain == DEPTH


@pytest.mark.slow
def test_weights_that_change_with_the_text_change_no_text(load_once: Load) -> None:
    router = FunctionRouter(lambda prompt, tail: np.array([0.8, 0.2])[:: -1 if tail[-1:] > b"m" else 1], 2)
    kinds = ("llama", "qwen2")
    fixed, usual = (pair(load_once, graphs, kinds, router=router, unit="token") for graphs in ("on", "off"))
    actual, expected = (write(engine, seed=3, max_tokens=80) for engine in (fixed, usual))
    assert actual[:2] == expected[:2]
    assert actual[2].ahead > 0 < actual[2].vain


@pytest.mark.slow
def test_wrong_samples_change_no_text(load_once: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, usual = (pair(load_once, graphs, ("llama", "qwen2"), unit="token") for graphs in ("on", "off"))
    token = DeviceSampler.sample
    for off, hits in ((0, True), (1, False)):
        monkeypatch.setattr(DeviceSampler, "sample", lambda self, part, *rest: (token(self, part, *rest) + off) % 500)  # noqa: B023
        for seed in range(2):
            actual, expected = (write(engine, seed=seed, max_tokens=40, ignore_end=True) for engine in (fixed, usual))
            assert actual[:2] == expected[:2]
            assert (actual[2].ahead > 10) == hits
            assert (actual[2].ahead == 0) == (actual[2].vain > 10) == (not hits)


class Asking:
    """One sequence that is asked with draws, as a strategy would: its session, its ids, and the noise of each place."""

    def __init__(self, engine: HFEngine, k: int = 5, seed: int = 0) -> None:
        self.engine = engine
        self.session = engine.session()
        self.transform = Transform(Sampling(top_k=k), np.array([1, 2]))
        self.ids = random_ids(engine, 4, seed)
        self._symbols = np.arange(engine.vocabulary.size)
        self._noise = Noise(seed)

    def draw(self, reach: int = DEPTH) -> SampleRequest:
        keys = tuple(self._noise.at(len(self.ids) + further).sample_key for further in range(reach))
        hint = RunAheadHint(keys, self.transform.sampling, self._symbols) if keys else None
        return SampleRequest(0, self.ids.copy(), lambda row: row, self.transform.top_k_filter, hint)

    def next(self, row: Any) -> int:
        distribution = self.transform(row)
        return int(distribution.ids[self._noise.at(len(self.ids)).sample(*distribution)])

    def check(self, row: Any) -> None:
        whole = uncached(self.engine, self.ids)[0]
        if isinstance(row, Candidates):
            whole[[1, 2]] = -np.inf
            np.testing.assert_array_equal(
                row.ids, np.flatnonzero(whole >= np.sort(whole)[-self.transform.sampling.top_k])
            )
            np.testing.assert_allclose(row.logprobs, whole[row.ids], atol=1e-4)
        else:
            np.testing.assert_allclose(row, whole, atol=1e-4)

    def go_on(self, count: int, *, checked: bool = True) -> None:
        """Write tokens, and check each row, which runs forwards of another sequence."""
        for _ in range(count):
            [row] = self.engine.respond([(self.session, self.draw())])
            if checked:
                self.check(row)
            self.ids = np.append(self.ids, self.next(row))


def record(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine's steps be recorded, as a GPU captures them."""

    def captured(run: Callable[[], torch.Tensor], *_: Any) -> tuple[Recorded, torch.Tensor]:
        recorded = Recorded(run)
        return recorded, recorded.out

    monkeypatch.setattr(steps, "warm_up", lambda run, _: run())
    monkeypatch.setattr(steps, "capture", captured)
    monkeypatch.setattr(Recorded, "replays", 0)
    engine.runner.graphs = steps.CudaGraphRunner(engine.model, capture=True)


@pytest.fixture
def uncrowded(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RUN_AHEAD_COOLDOWN", 0)
    # Of a batch on, it counts for the engine too, which other tests have used.
    engine.respond([(each.session, each.draw()) for each in (Asking(engine), Asking(engine, seed=1))])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("uncrowded")
def test_whatever_is_requested_in_between_gets_the_uncached_response(engine: HFEngine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, other = Asking(engine, seed=seed), Asking(engine, 9, seed + 50)
    requests = ["whole", "several", "back", "replaced", "both", "cut", "other cut", "forgotten", "again", "none"]
    for kind in rng.permutation(requests * 2):
        first.go_on(int(rng.integers(1, 4)))
        if kind == "whole":
            first.session.logits(first.ids)
        elif kind == "several":
            actual = first.session.logits(first.ids, 3)
            np.testing.assert_allclose(actual, uncached(engine, first.ids, 3), atol=1e-4)
        elif kind == "back":
            first.ids = first.ids[: -int(rng.integers(1, 4))]
        elif kind == "replaced":
            first.ids[-1:] = random_ids(engine, 1, int(rng.integers(1000)))
        elif kind == "both":
            other.go_on(1)
            rows = engine.respond([(first.session, first.draw()), (other.session, other.draw())])
            for each, row in zip((first, other), rows, strict=True):
                each.check(row)
                each.ids = np.append(each.ids, each.next(row))
        elif kind == "cut":
            [[row]] = engine.respond([(first.session, LogitsRequest(0, first.ids, 1, first.transform.top_k_filter))])
            first.check(row)
        elif kind == "other cut":
            transform, first.transform = first.transform, other.transform
            first.go_on(1)
            first.transform = transform
        elif kind == "forgotten":
            first.session.reset()
        elif kind == "again":
            first.check(engine.respond([(first.session, first.draw())])[0])
        else:
            first.check(engine.respond([(first.session, first.draw(0))])[0])
        assert (first.session.cache.length if first.session.cache else 0) == len(first.session._cached.ids)
    assert first.session.stats.run_ahead > 15
    assert first.session.stats.wasted > 5


@pytest.mark.usefixtures("uncrowded")
def test_a_session_that_has_run_ahead_is_served_alone(engine: HFEngine) -> None:
    first, other = Asking(engine), Asking(engine, seed=1)
    for each in (first, other):
        each.go_on(2)
    before = first.session.stats.run_ahead
    rows = engine.respond([(each.session, each.draw()) for each in (first, other)])
    for each, row in zip((first, other), rows, strict=True):
        each.check(row)
        assert each.session.stats.forwards[-1][:2] == (1, len(each.ids) - 1)
        assert each.session.stats.forwards[-1].batch_size == 1
    assert first.session.stats.run_ahead == before + 1


def test_no_session_runs_ahead_after_a_batch(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RUN_AHEAD_COOLDOWN", 6)
    first, other = Asking(engine), Asking(engine, seed=1)
    engine.respond([(each.session, each.draw()) for each in (first, other)])
    first.go_on(6, checked=False)  # the first is known by now
    assert not first.session.has_run_ahead
    assert first.session.stats.run_ahead == first.session.stats.wasted == 0
    first.go_on(2, checked=False)
    assert first.session.has_run_ahead
    assert first.session.stats.run_ahead == 1


@pytest.mark.slow
@pytest.mark.parametrize("captures", [False, True])
def test_tied_rows_are_transferred_whole(load: Load, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    driver = Asking(load("qwen2"))
    if captures:  # where the logits of one step are written over by the next
        record(driver.engine, monkeypatch)
    head = driver.engine.model.get_output_embeddings()
    weight = head.weight
    # Most logits are 0, so the fifth is tied wherever fewer than five of the others are above that.
    few = torch.zeros_like(weight)
    few[20:29] = weight[20:29]
    head.weight = torch.nn.Parameter(few)
    try:
        whole, cut = 0, 0
        for _ in range(60):
            [row] = driver.engine.respond([(driver.session, driver.draw())])
            driver.check(row)
            whole, cut = whole + isinstance(row, np.ndarray), cut + isinstance(row, Candidates)
            driver.ids = np.append(driver.ids, driver.next(row))
    finally:
        head.weight = weight
    assert whole > 5 < cut
    assert driver.session.stats.run_ahead > 2
    assert len(driver.session.stats.forwards) == 60


@pytest.mark.slow
def test_no_more_is_run_than_a_context_or_a_buffer_holds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ran: list[tuple[int, int]] = []
    run_on = steps.CudaGraphRunner.run_token

    def noted(self: steps.CudaGraphRunner, room: Any, token: torch.Tensor, length: int) -> Any:
        ran.append((length, room.size))
        return run_on(self, room, token, length)

    driver = Asking(load("mistral"))
    monkeypatch.setattr(steps.CudaGraphRunner, "run_token", noted)
    driver.ids = random_ids(driver.engine, 250)
    driver.session.context_length = 262
    driver.go_on(12)
    assert [length for length, _ in ran] == [*range(250, 256), *range(257, 262)]
    assert all(length < size for length, size in ran)
    assert driver.session.stats.run_ahead == 10


def test_members_with_one_filter_are_sampled_by_their_own_symbols() -> None:
    # Two members may be set up with one transform, and mean other symbols by their ids.
    logits, transform = (
        torch.randn(500, generator=torch.Generator().manual_seed(0)),
        Transform(Sampling(), np.arange(3)),
    )
    draws = DeviceSampler(DeviceTopK())
    assert transform.top_k_filter is not None
    part = draws.top_k.select(logits[None], transform.top_k_filter, [0])[0]
    distribution = transform(logits.numpy())
    for key, shift in enumerate([0, 1000, 0, 77]):
        noise, symbols = Noise(key), np.arange(500) + shift
        hint = RunAheadHint((noise.sample_key,), transform.sampling, symbols)
        actual = int(draws.sample(part, transform.top_k_filter, hint, noise.sample_key))
        assert actual == distribution.ids[noise.sample(symbols[distribution.ids], distribution.logprobs)]


@pytest.mark.slow
def test_engines_that_do_not_run_ahead_get_no_hint(load_once: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(_: Any, __: int, limit: int) -> int:
        assert limit == 1
        return 1

    monkeypatch.setattr(mixture, "run_length", one)
    toys("token", 2).generate("ab", raw=True, max_tokens=5)
    pair(load_once, "off", ("llama", "qwen2")).generate("the river", max_tokens=5)
    whole = pair(load_once, "on", ("llama", "qwen2"))
    whole.generate("the river", max_tokens=5, top_k=0)
    whole.generate("the river", max_tokens=5, repetition_penalty=1.1)
    whole.generate("the river", max_tokens=5, logprobs_of="ensemble")
    with pytest.raises(AssertionError):
        whole.generate("the river", max_tokens=5)


@pytest.mark.parametrize("broken", ["fails", "errs", "steps err"])
def test_a_device_that_cannot_sample_does_not_run_ahead(
    load: Load,  # noqa: F811
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if broken == "fails":
        monkeypatch.setattr(ahead, "gumbel", lambda starts, key: starts.no_such_operation)
    elif broken == "errs":
        monkeypatch.setattr(ahead, "gumbel", lambda starts, key: starts.double())
    else:
        monkeypatch.setattr(steps.FixedShapeForward, "set_token", lambda self, token, length: None)
    engine = load("llama")
    assert engine.runner.graphs is not None
    assert engine.run_ahead_depth == 0
    assert not engine.session().has_run_ahead


@pytest.mark.slow
def test_only_engines_with_fixed_shapes_run_ahead(load_once: Load) -> None:
    assert load_once("llama", "on", "cpu").run_ahead_depth == DEPTH
    assert load_once("llama", "off", "cpu").run_ahead_depth == 0
    assert load_once("llama", "on", "cpu").runner.with_adapter("some adapter").run_ahead_depth == DEPTH


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture", "single"])
def test_recorded_forwards_run_ahead_alike(
    load: Load,  # noqa: F811
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixed, usual = (pair(load, graphs, ("gemma3", "qwen2"), unit="token") for graphs in ("on", "off"))
    for member in fixed.members:
        record(member.engine, monkeypatch)
    for seed in range(2):  # on rooms that go from one completion to the next
        actual, expected = (
            write(member, method=method, seed=seed, max_tokens=60, ignore_end=True) for member in (fixed, usual)
        )
        assert actual[:2] == expected[:2]
        assert actual[2].ahead == sum(member[1] == other[1] for member, other in pairwise(actual[0]))
    assert Recorded.replays > 60


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")


@CUDA
def test_a_gpu_samples_what_the_host_samples() -> None:
    both = [actual for seed in range(1500) if (actual := sampled_twice(seed, "cuda")) is not None]
    assert sum(device == host for device, host in both) > 0.99 * len(both) > 400


@CUDA
@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("method", ["mixture", "single"])
@pytest.mark.parametrize("kinds", [("llama", "qwen2"), ("gemma3", "mistral")])
def test_captured_forwards_run_ahead_alike(load: Load, kinds: tuple[str, str], method: str, unit: Any) -> None:  # noqa: F811
    captured, usual = (pair(load, graphs, kinds, device="cuda", unit=unit) for graphs in ("auto", "off"))
    assert [member.engine.run_ahead_depth for member in captured.members] == [DEPTH] * 2
    for seed, more in enumerate([{}, TRUNCATED, {"stop": ["e"]}, {}]):
        options = {"method": method, "seed": seed, "max_tokens": 60, **more}
        actual, expected = write(captured, **options), write(usual, **options)
        assert actual[:2] == expected[:2]
        assert actual[2].forwards == expected[2].forwards
        assert actual[2].ahead > 0 or len(actual[0]) < 12


@CUDA
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_that_runs_ahead_waits_for_the_device(load: Load) -> None:  # noqa: F811
    driver = Asking(load("llama", "auto", "cuda"))
    driver.transform = Transform(Sampling(**TRUNCATED), np.array([1, 2]))
    go_on = ahead.RunAhead._extend

    def strictly(self: ahead.RunAhead, hint: RunAheadHint, run: int) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            go_on(self, hint, run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    driver.go_on(6, checked=False)  # what is captured, and what is brought to the device once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead.RunAhead, "_extend", strictly)
        driver.go_on(20, checked=False)
    assert driver.session.stats.run_ahead >= 20
