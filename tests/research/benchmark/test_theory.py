"""Each formula of docs/performance.md against the code that it describes, or a simulation of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import LARGE, shapes
from torch.utils._python_dispatch import TorchDispatchMode

from mixlm.benchmark.measure import predicted_speed
from mixlm.benchmark.timing import TimedRun, contestants
from mixlm.binding import LoadedMember
from mixlm.core.rng import Noise
from mixlm.decoding.cost_model import (
    DraftPlan,
    ForwardCosts,
    drafted_greedy_seconds,
    fit_forward_costs,
    mixture_seconds,
    speculative_seconds,
)
from mixlm.engines import EngineSpec
from mixlm.engines.base import Session
from mixlm.engines.requests import Forward, Request, Response
from mixlm.engines.toy import ToyEngine
from mixlm.engines.transformers import cuda_graphs, self_test
from mixlm.engines.transformers import dummy_weights as shape
from mixlm.engines.transformers.dummy_weights import SHAPES
from mixlm.ensemble import Ensemble
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from research.benchmark import ComparisonPlan, compare
from research.benchmark.agreement import with_agreement
from research.benchmark.roofline import H100, DeviceSpec, ForwardNeeds, batch_share


def toys(weights: tuple[float, ...]) -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in range(len(weights))], weights)


def log(c: float, s: float, lengths: list[int]) -> list[Forward]:
    return [Forward(q, 50, c * (1 + s * (q - 1))) for q in lengths]


def costs(*seconds: float) -> ForwardCosts:
    return ForwardCosts(np.array(seconds), np.zeros(len(seconds)))


def fitted(forwards: list[Forward]) -> tuple[float, float]:
    fit = fit_forward_costs([forwards])
    return float(fit.seconds[0]), float(fit.slopes[0])


def test_c_and_s_are_found_again_and_prompts_left_out() -> None:
    for c, s in ((0.05, 0.02), (0.3, 0.2)):
        forwards = [*log(c, s, [1, 2, 1, 3, 5, 1, 8, 2]), Forward(200, 0, 9.0), Forward(100, 7, 9.0)]
        assert fitted(forwards) == pytest.approx((c, s))
    assert fitted(log(0.05, 0.0, [1, 1])) == (0.05, 0.02)  # nothing longer was seen
    slow = [sample._replace(seconds=5.0) for sample in log(0.05, 0.01, [1, 2, 4])]  # the first of each length
    assert fitted([*slow, *log(0.05, 0.01, [1, 2, 4] * 3)]) == pytest.approx((0.05, 0.01))
    assert np.isnan(fitted([])[0])


@pytest.mark.slow
def test_a_member_of_weight_lambda_catches_up_with_one_over_lambda_tokens() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    [run] = compare(toys((0.5, 0.3, 0.2)), ComparisonPlan(3000, 1, methods=["mixture"])).runs
    for name, weight in zip(run.members, weights, strict=True):
        assert run.forwards[name] / 3000 == pytest.approx(weight, abs=0.03)
    # Every member but the last to be sampled has read every token: tokens in all over forwards is 1/λ.
    seconds, slopes = np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3])
    coins = [Noise(1, 0, i).coin(weights) for i in range(20_000)]
    last, total = np.full(3, -1), 0.0
    for i, z in enumerate(coins):
        total += seconds[z] * (1 + slopes[z] * (i - last[z] - 1))
        last[z] = i
    assert total / len(coins) == pytest.approx(mixture_seconds(weights, ForwardCosts(seconds, slopes)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "share", "block"), [(0.5, 0.8, 4), (0.5, 0.5, 2), (0.3, 0.9, 3), (0.7, 0.8, 6)])
def test_forwards_of_the_member_that_checks(weight: float, share: float, block: int) -> None:
    options: Any = {"draft": "toy-0", "block": block}
    ensemble = toys((weight, 1 - weight))
    [run] = compare(ensemble, ComparisonPlan(1600, 1, methods=["speculative"], agreement=share), options=options).runs
    observed = run.forwards["toy-1"] / 1600
    assert observed == pytest.approx((1 - weight) * (1 - share) / (1 - share ** (block + 1)), rel=0.08)
    # With c of the draft 0, the cost model counts the other member's forwards and nothing else.
    free = speculative_seconds(ensemble.weights, costs(0.0, 1.0), DraftPlan(0, block, share))
    assert observed == pytest.approx(free, rel=0.08)
    # And with both, it is what the forwards that were run would take.
    price = run.forwards["toy-0"] / 1600 * 0.1 + observed
    expected = speculative_seconds(ensemble.weights, costs(0.1, 1.0), DraftPlan(0, block, share))
    assert price == pytest.approx(expected, rel=0.08)


def test_a_draft_of_a_tenth_that_is_right_four_times_of_five_nearly_halves_the_time() -> None:
    weights = np.array([0.5, 0.5])
    mixture = mixture_seconds(weights, costs(0.1, 1.0))
    assert mixture == pytest.approx(0.55)
    speculative = speculative_seconds(weights, costs(0.1, 1.0), DraftPlan(0, 4, 0.8))
    assert mixture / speculative == pytest.approx(1.95, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("block", [2, 5])
def test_forwards_of_greedy_with_a_draft(block: int) -> None:
    options: Any = {"draft": "toy-0", "block": block}
    ensemble = toys((1, 1))
    [run] = compare(ensemble, ComparisonPlan(1500, 1, methods=["drafted"], agreement=0.7), options=options).runs
    assert run.acceptance is not None
    for c in ((0.0, 1.0), (1.0, 0.0), (0.2, 1.0)):
        expected = drafted_greedy_seconds(ensemble.weights, costs(*c), DraftPlan(0, block, run.acceptance))
        assert sum(c[i] * run.forwards[f"toy-{i}"] for i in range(2)) / 1500 == pytest.approx(expected, rel=0.06)


def test_what_the_model_expects_of_each_method() -> None:
    ensemble = toys((1, 3))
    fit = costs(0.1, 0.4)
    runs = [TimedRun(10, 1.0, 0.1, 10, [], drafted=10, accepted=5)]
    kinds = ["single", "conventional", "mixture", "speculative", "drafted", "auto", "greedy"]
    ratios = [
        predicted_speed(ensemble, contestant, runs, fit)
        for contestant in contestants(ensemble, kinds, "the river", {"draft": "toy-0", "block": 1})
    ]
    speculative = speculative_seconds(ensemble.weights, fit, DraftPlan(0, 1, 0.5))
    assert ratios == [
        pytest.approx(10),
        pytest.approx(2.5),
        pytest.approx(2),
        pytest.approx(1 / (0.25 * 0.1 + 0.75 * 0.4)),
        pytest.approx(1 / speculative),
        pytest.approx(1.5 / (2 * 0.1 + 0.4)),
        None,
        None,
    ]
    [lookup] = contestants(ensemble, ["speculative"], "the river", {"draft": "lookup"})
    assert predicted_speed(ensemble, lookup, runs, fit) is None


class Counting(ToyEngine):
    """A toy that counts how often it is called, and for how many completions."""

    calls = 0
    completions = 0

    def respond(self, requests: Any) -> list[Response]:
        batch: list[tuple[Session, Request]] = list(requests)
        self.calls += 1
        self.completions += len(batch)
        return super().respond(batch)


@pytest.mark.parametrize("members", range(2, 9))
def test_the_longest_queue_holds_two_of_n_plus_one_completions(members: int) -> None:
    assert batch_share(6400, members) == pytest.approx(2 / (members + 1), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 3])
def test_the_scheduler_serves_what_the_simulation_says(members: int) -> None:
    calls = {}
    for method in ("mixture", "conventional"):
        engines = [Counting(seed=i) for i in range(members)]
        ensemble = Ensemble([LoadedMember(engine, f"toy-{i}") for i, engine in enumerate(engines)])
        settings = ensemble.settings(method=method, seed=1, max_tokens=80, raw=True, ignore_end=True)
        scheduler = Scheduler(48)
        streams: list[Generation] = []
        for number in range(48):
            context = ensemble.context(settings.with_sequence_offset(number))
            streams.append(context.start(ensemble.encode_prompt("the river", settings)))
            scheduler.add(streams[-1])
        for _ in range(60):  # all completions are under way
            scheduler.step()
        calls[method] = sum(engine.completions for engine in engines) / sum(engine.calls for engine in engines) / 48
    assert calls["conventional"] == 1.0
    assert calls["mixture"] == pytest.approx(batch_share(48, members), rel=0.08)
    # A token takes one answer in mixture, and n in conventional.
    assert members * calls["mixture"] == pytest.approx(2 * members / (members + 1), rel=0.12)


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_reads_every_weight_but_the_table_of_input_embeddings(name: str) -> None:
    with torch.device("meta"):
        model = shape.from_shape(SHAPES[name], torch.bfloat16)
    table = 0 if SHAPES[name]["tie_word_embeddings"] else model.get_input_embeddings().weight.numel()
    assert ForwardNeeds.of(SHAPES[name]).weights == sum(parameter.numel() for parameter in model.parameters()) - table


def test_a_token_leaves_as_many_keys_and_values_as_the_formula_says() -> None:
    engine: Any = shapes().members[1].engine
    session = engine.session()
    session.logits(np.arange(20))
    tensors = [tensor for pair in session.cache.reserve(0).layers.values() for tensor in pair]
    assert sum(tensor.shape[0] * tensor.shape[2] for tensor in tensors) == ForwardNeeds.of(LARGE).cache


class Launches(TorchDispatchMode):
    """Counts operations that are a kernel on a device: what makes a view only is none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def launches(sizes: dict[str, Any]) -> int:
    model = shape.create_model(sizes, torch.float32, "cpu")
    model.set_attn_implementation("sdpa")
    counted = Launches()
    with torch.inference_mode(False), torch.no_grad(), counted:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return counted.count


@pytest.mark.slow
def test_launches_grow_with_the_layers_and_not_with_their_size() -> None:
    two, three, five = (launches({**LARGE, "num_hidden_layers": layers}) for layers in (2, 3, 5))
    a_layer = three - two
    assert five - three == 2 * a_layer
    assert a_layer > 20
    assert launches({**LARGE, "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}) == two


@pytest.mark.slow
def test_a_step_of_fixed_shape_starts_26_kernels_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    # A norm is a kernel of its own on a GPU, and several operations here.
    monkeypatch.setattr(cuda_graphs, "_fused", lambda _: torch.clone)
    monkeypatch.setattr(self_test, "TOLERANCE", 2.0)  # whatever comes out
    counts = []
    for layers in (2, 3, 5):
        sizes = {**SHAPES["qwen2.5-0.5b"], **{k: v for k, v in LARGE.items() if k.endswith(("_size", "_heads"))}}
        spec = EngineSpec("shape:tiny", "", "bfloat16", "cpu", graphs="on")
        session = shape.DummyWeightsEngine(spec, {**sizes, "num_hidden_layers": layers}).session()
        session.logits(np.arange(8))
        session.logits(np.arange(9))
        with Launches() as counted:
            session.logits(np.arange(10))
        counts.append(counted.count)
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2 == 26


def test_members_cut_over_all_devices_are_n_times_as_fast_as_each_on_its_own_share() -> None:
    free = DeviceSpec(H100.bandwidth, H100.compute)
    need = ForwardNeeds.of(SHAPES["llama-3.1-8b"])
    for members in (2, 4):
        # Conventional in parallel: each member on 8/n devices, all at once. Mixture: the one that is sampled, on all 8.
        assert need.seconds(free, devices=8 // members) / need.seconds(free, devices=8) == pytest.approx(members)
    # Adding up over devices puts an end to it.
    assert need.seconds(H100, devices=4) / need.seconds(H100, devices=8) < 1.8
    assert need.seconds(H100, devices=1000) > 2 * 32 * H100.reduce
    assert need.seconds(H100, devices=2) - need.seconds(free, devices=2) == pytest.approx(2 * 32 * H100.reduce)


def test_reading_bounds_a_short_forward_and_arithmetic_a_long_one() -> None:
    need = ForwardNeeds.of(SHAPES["qwen2.5-3b"])
    assert need.seconds(H100) == need.bytes() / H100.bandwidth == need.seconds(H100, tokens=200)
    assert need.seconds(H100, tokens=1000) == need.operations(1000) / H100.compute
    assert need.seconds(H100, launches=1000) == 1000 * H100.launch > need.seconds(H100, launches=400)
    assert need.bytes(1000, rows=3) - need.bytes() == 2 * 3000 * need.cache


def test_agreed_members_take_no_more_forwards_than_the_rest_of_the_formulas_count() -> None:
    ensemble = with_agreement(toys((1, 1)), 1.0)
    [contestant] = contestants(ensemble, ["speculative"], "the river", {"draft": "toy-0", "block": 3})
    sample = contestant.measure(1, 400)
    assert sample.accepted == sample.drafted > 0
    assert len(sample.forwards[1]) / 400 == pytest.approx(0.5 / 4, rel=0.1)
