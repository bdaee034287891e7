"""The simulation against what queueing theory says of cases that it can solve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from research.planning.__main__ import main
from research.planning.costs import MemberCost, PlanCosts, RouterCost, read_costs, write_costs
from research.planning.measure import fitted, measure
from research.planning.plan import PlanTarget, expected, needed, sweep
from research.planning.simulation import Workload, simulate


def one_member(forward: float = 0.1, **options) -> PlanCosts:
    return PlanCosts(members={"a": MemberCost(weight=1, forward=forward, slots=1, **options)})


def pair(**options) -> PlanCosts:
    return PlanCosts(members={name: MemberCost(weight=0.5, forward=1.0, **options) for name in "ab"})


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_the_wait_of_one_server_with_equal_services_is_that_of_pollaczek_and_khinchine(load):
    seen = simulate(one_member(), Workload(load / 0.1, 1, 1, 10**6, "fixed"), count=20_000)
    assert seen.first.mean() - 0.1 == pytest.approx(0.1 * load / (2 * (1 - load)), rel=0.1)  # M/D/1
    assert seen.busy["a"][0] == pytest.approx(load, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_the_wait_of_one_server_with_random_services(load):
    """Completions are one run of geometric length, which at 20 tokens is nearly an exponential service: M/M/1."""
    tokens, forward = 20, 0.005
    service = tokens * forward
    seen = simulate(one_member(forward, runs=True), Workload(load / service, 1, tokens, 10**6), count=8_000)
    square = forward**2 * (2 * tokens**2 - tokens)  # of a geometric distribution
    wait = load / service * square / (2 * (1 - load))
    assert wait == pytest.approx(service * load / (1 - load), rel=0.03)
    assert (seen.whole.mean() - service) == pytest.approx(wait, rel=0.1)


@pytest.mark.slow
def test_replicas_that_serve_everyone_at_once_add_nothing_but_room():
    costs = PlanCosts(members={"a": MemberCost(weight=1, forward=0.1, slots=10**6)})
    seen = simulate(costs, Workload(5, 1, 20, 10**6, "fixed"), count=2000)
    assert np.median(seen.whole) == pytest.approx(20.5 * 0.1, rel=0.02)  # half a forward until the next one begins


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 3, 4])
def test_members_in_turn_on_one_device_serve_two_of_n_plus_one_at_a_time(members):
    """n equal members, the longest queue first: 2n/(n + 1) times as many tokens a forward as one for each token."""
    costs = PlanCosts(
        members={f"m{i}": MemberCost(weight=1 / members, forward=1.0, device="one") for i in range(members)}
    )
    seen = simulate(costs, Workload(None, 1, 400, 64, "fixed"), count=64)
    together = seen.tokens_per_second * members  # forwards that conventional makes for each position
    assert together / 64 == pytest.approx(2 * members / (members + 1), rel=0.06)


def test_two_machines_that_work_at_once_write_a_token_of_every_completion_in_a_step():
    seen = simulate(pair(), Workload(None, 1, 300, 32, "fixed"), count=32)
    assert seen.tokens_per_second == pytest.approx(32, rel=0.03)
    assert [round(shares[0], 1) for shares in seen.busy.values()] == [1.0, 1.0]


def test_what_members_read_is_what_others_wrote():
    """Each token of the text and of the prompt is run by every member once, the last one apart."""
    costs = PlanCosts(members={name: MemberCost(weight=0.5, forward=1.0, sequence=1.0, token=1.0) for name in "ab"})
    seen_work = simulate(costs, Workload(None, 10, 500, 1, "fixed"), count=1)
    seconds = sum(shares[0] for shares in seen_work.busy.values()) * seen_work.whole[0]
    assert seconds == pytest.approx(2 * 510, abs=30)


def test_runs_make_fewer_questions():
    router = RouterCost(seconds=1.0)
    single = simulate(PlanCosts(members=pair().members, router=router), Workload(None, 1, 400, 1, "fixed"), count=4)
    runs = simulate(
        PlanCosts(members=pair(runs=True).members, router=router), Workload(None, 1, 400, 1, "fixed"), count=4
    )
    words = simulate(PlanCosts(members=pair().members, router=router), Workload(None, 1, 400, 1, "fixed", 3.0), count=4)
    # Equal coins in a row are two on average, so mixlm's second is spent half as often: 1.5 s a token in place of 2.
    assert single.whole.mean() / runs.whole.mean() == pytest.approx(2 / 1.5, rel=0.05)
    assert words.whole.mean() == pytest.approx(single.whole.mean(), rel=0.05)


@pytest.mark.slow
def test_mixlm_itself_can_be_what_is_full():
    costs = PlanCosts(members=pair().members, router=RouterCost(seconds=0.5))
    seen = simulate(costs, Workload(None, 1, 200, 32, "fixed"), count=64)
    assert seen.tokens_per_second == pytest.approx(2, rel=0.05)
    two = costs.model_copy(update={"router": RouterCost(seconds=0.5, processes=2)})
    assert simulate(two, Workload(None, 1, 200, 32, "fixed"), count=64).tokens_per_second == pytest.approx(4, rel=0.05)


@pytest.mark.slow
def test_sequences_stay_with_their_machine_and_share_them_evenly():
    costs = one_member(replicas=3).with_replicas({"a": 4})
    seen = simulate(costs, Workload(20, 1, 1, 10**6, "fixed"), count=8000)
    assert len(seen.busy["a"]) == 4
    assert max(seen.busy["a"]) - min(seen.busy["a"]) < 0.5
    assert sum(seen.busy["a"]) == pytest.approx(20 * 0.1, rel=0.05)


def test_equal_seeds_give_equal_runs():
    runs = [simulate(pair(), Workload(0.1, 5, 9), count=200, seed=seed).whole.sum() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_as_few_machines_as_keep_up_are_found():
    load = Workload(25, 1, 1, 10**6, "fixed")
    point = needed(one_member(), load, PlanTarget(busy=0.85), count=4000)
    assert point.replicas == {"a": 3}  # 2.5 machines' work
    sooner = needed(one_member(), load, PlanTarget(first=0.105, busy=0.85), count=4000)
    assert sooner.replicas["a"] > 3
    assert not expected(one_member(), load, count=4000).keeps_up
    with pytest.raises(ConfigError, match="give --rate"):
        needed(one_member(), Workload(None, 1, 1), PlanTarget())
    with pytest.raises(ConfigError, match="no number of machines"):
        needed(one_member(), load, PlanTarget(first=0.05), count=50)


@pytest.mark.slow
def test_more_that_comes_waits_longer():
    points = sweep(one_member(), Workload(None, 1, 1, 10**6, "fixed"), [2, 5, 8], count=4000)
    waits = [point.as_dict()["first_token"]["p95"] for point in points]
    assert waits == sorted(waits)


def test_costs_are_fitted_and_never_below_nothing():
    timed = [(n, q, 0.01 + 0.002 * (n - 1) + 0.003 * (q - n)) for n, q in ((1, 1), (4, 4), (8, 8), (1, 9), (1, 33))]
    np.testing.assert_allclose(fitted(timed), (0.01, 0.002, 0.003), rtol=1e-6)
    assert fitted([(1, 1, 0.02), (4, 4, 0.01), (1, 9, 0.02)])[1] == 0


def test_costs_of_an_ensemble_are_measured():
    members = [LoadedMember(ToyEngine(seed=seed), f"m{seed}") for seed in (1, 2)]
    costs = measure(Ensemble(members, [0.7, 0.3]), max_batch=4)
    assert [member.weight for member in costs.members.values()] == [0.7, 0.3]
    assert all(member.forward > 0 and member.device == "cpu" for member in costs.members.values())
    assert costs.router.seconds > 0
    assert not any(member.runs for member in costs.members.values())


def test_members_that_sample_themselves_are_planned_by_runs():
    members = [LoadedMember(ToyEngine(seed=seed, samples_itself=seed == 1), f"m{seed}") for seed in (1, 2)]
    costs = measure(Ensemble(members), max_batch=2)
    assert {name: member.runs for name, member in costs.members.items()} == {"m1": True, "m2": False}


def test_a_file_of_costs_is_read_back_and_mistakes_are_named(tmp_path):
    path = tmp_path / "costs.toml"
    costs = PlanCosts(members={"a": MemberCost(weight=1, forward=0.01, device="x")}, router=RouterCost(seconds=0.001))
    write_costs(costs, path)
    assert read_costs(path) == costs
    for text, message in (
        ("[members.a]\nweight = 1", "members.a.forward: Field required"),
        ("[members.a]\nweight = 1\nforward = -1", "members.a.forward"),
        ("[members.a]\nweight = 1\nforward = 1\nslot = 1", "members.a.slot"),
        ("x = [", "not valid TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_costs(path)
    with pytest.raises(ConfigError, match="there is no file of costs"):
        read_costs(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"no member 'b'"):
        costs.with_replicas({"b": 2})
    with pytest.raises(ConfigError, match="shares the device"):
        costs.with_replicas({"a": 2})


@pytest.fixture
def costs_file(tmp_path) -> Path:
    path = tmp_path / "costs.toml"
    members = {name: MemberCost(weight=0.5, forward=0.01, sequence=0.002, token=0.003) for name in ("one", "two")}
    write_costs(PlanCosts(members=members, router=RouterCost(seconds=0.001)), path)
    return path


@pytest.mark.slow
def test_the_command_plans_from_a_file(costs_file, capsys):
    assert main([str(costs_file), "--rate", "0.5,1", "--replies", "60", "--replicas", "one=2"]) == 0
    message = capsys.readouterr().out
    assert "one × 2" in message
    assert "first token" in message
    assert main([str(costs_file), "--rate", "2", "--need", "--json", "--replies", "100"]) == 0
    [point] = json.loads(capsys.readouterr().out)["points"]
    assert point["keeps_up"] is True
    assert point["replicas"]["one"] >= 2


@pytest.mark.slow
def test_the_command_draws_rates(costs_file, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("plan.svg", "plan.png"):
        path = tmp_path / name
        assert main([str(costs_file), "--rate", "0.2,0.4", "--replies", "40", "--plot", str(path)]) == 0
        assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "x"], "--rate is 'x'"),
        (["--rate", "0"], "more than 0"),
        (["--replicas", "one"], "--replicas is 'one'"),
        (["--replicas", "three=2"], "no member 'three'"),
        (["--at-once", "0"], "--at-once is 0"),
        (["--need"], "give --rate"),
        (["--plot", "x.png"], "--plot draws several rates"),
        (["-m", "toy:1"], "measure them: --measure"),
    ],
)
def test_what_the_command_is_given_is_checked(costs_file, capsys, arguments, message):
    assert main([str(costs_file), *arguments]) != 0
    assert message in capsys.readouterr().err


def test_the_command_measures(tmp_path, capsys):
    path = tmp_path / "measured.toml"
    assert main([str(path), "--measure", "-m", "toy:1", "-m", "toy:2", "--replies", "20", "--reply", "10"]) == 0
    assert set(read_costs(path).members) == {"toy:1", "toy:2"}
    assert "tokens/s" in capsys.readouterr().out
