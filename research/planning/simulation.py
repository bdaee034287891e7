"""A discrete-event simulation of completions, mixlm and the members' machines as queues.

A completion waits for its turn, then goes from run to run: mixlm prepares a request (its processors are a queue), the
request travels, waits at the machine that the completion keeps for this member, and joins the next forward. A machine
puts all waiting requests into one forward, up to its slots; where members share one, the longest queue is next.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from research.planning.costs import MemberCost, PlanCosts

Lengths = Literal["fixed", "geometric"]


@dataclass(frozen=True)
class Workload:
    """The load.

    Args:
        rate: Completions per second, at random times; None for `at_once` completions at any time.
        prompt: Tokens of a prompt.
        length: Mean tokens of a completion.
        at_once: Completions generated together at most.
        lengths: Whether all completions have the mean length, or a geometric distribution of lengths.
        coin: Mean tokens that one coin decides; more than 1 for words.
    """

    rate: float | None
    prompt: int
    length: float
    at_once: int = 16
    lengths: Lengths = "geometric"
    coin: float = 1.0


@dataclass(frozen=True)
class SimulationResult:
    """The result for the completions after the first fifth, in seconds.

    Args:
        tokens_per_second: Throughput.
        completions_per_second: Completions per second.
        first: Time to the first token of each completion, waiting included.
        whole: Time to its last token.
        waited: Time until its turn.
        busy: The share of time that each of a member's machines worked.
        router: The share of time that mixlm worked.
        late: The share of completions that had not begun when the last one arrived.
    """

    tokens_per_second: float
    completions_per_second: float
    first: np.ndarray
    whole: np.ndarray
    waited: np.ndarray
    busy: dict[str, list[float]]
    router: float
    late: float


@dataclass(eq=False)
class _SimulatedGeneration:
    came: float
    left: int
    read: list[int]
    length: int
    homes: list[_SimulatedMachine | None]
    began: float = 0.0
    first: float = 0.0
    owed: int = 0  # tokens that the coin which was sampled last still decides
    member: int = -1


@dataclass(eq=False)
class _SimulatedRequest:
    generation: _SimulatedGeneration
    member: int
    tokens: int
    steps: int


@dataclass(eq=False)
class _SimulatedMachine:
    queues: dict[int, deque[_SimulatedRequest]] = field(default_factory=dict)
    going: dict[int, list[_SimulatedRequest]] = field(default_factory=dict)
    working: bool = False
    worked: float = 0.0
    homes: int = 0


class _Simulation:
    """One run of it. Everything random comes from one generator, so equal seeds give equal runs."""

    def __init__(self, costs: PlanCosts, load: Workload, count: int, seed: int) -> None:
        self.load = load
        self._costs: list[MemberCost] = list(costs.members.values())
        self._router = costs.router
        weights = np.array([cost.weight for cost in self._costs])
        self._chances = np.cumsum(weights / weights.sum())
        self._random = np.random.default_rng(seed)
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._count = 0
        self.now = 0.0
        shared: dict[str, _SimulatedMachine] = {}
        self.machines: list[list[_SimulatedMachine]] = [
            [shared.setdefault(cost.device, _SimulatedMachine())]
            if cost.device
            else [_SimulatedMachine() for _ in range(cost.replicas)]
            for cost in self._costs
        ]
        self._total = count
        self._come = self._in_progress = 0
        self._waiting: deque[_SimulatedGeneration] = deque()
        self._free = self._router.processes
        self._to_prepare: deque[_SimulatedGeneration] = deque()
        self.router_worked = 0.0
        self.done: list[tuple[_SimulatedGeneration, float]] = []
        self.wrote: list[tuple[float, int]] = []  # when, and how many tokens
        self.late = 0
        self.last_came = 0.0
        self.worked_then: list[list[float]] = []
        self.router_then = 0.0

    def run(self) -> None:
        """Let all completions come and go."""
        if self.load.rate is None:
            for _ in range(min(self.load.at_once, self._total)):
                self._arrive()
        else:
            self._at(self._random.exponential(1 / self.load.rate), self._arrive_and_next)
        while self._events:
            self.now, _, _, event = heapq.heappop(self._events)
            event()

    def _at(self, delay: float, event: Callable[[], None], *, last: bool = False) -> None:
        """Let something happen later. last: after all else that happens at that time."""
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, last, self._count, event))

    def _arrive_and_next(self) -> None:
        self._arrive()
        if self._come < self._total:
            assert self.load.rate is not None
            self._at(self._random.exponential(1 / self.load.rate), self._arrive_and_next)

    def _arrive(self) -> None:
        self._come += 1
        mean = self.load.length
        length = max(1, round(mean)) if self.load.lengths == "fixed" else int(self._random.geometric(1 / max(mean, 1)))
        members = len(self._costs)
        self._waiting.append(_SimulatedGeneration(self.now, length, [0] * members, length, [None] * members))
        self._admit()
        if self._come == self._total:
            self.late, self.last_came = len(self._waiting), self.now
            self.worked_then = [[machine.worked for machine in group] for group in self.machines]
            self.router_then = self.router_worked

    def _admit(self) -> None:
        while self._waiting and self._in_progress < self.load.at_once:
            self._in_progress += 1
            generation = self._waiting.popleft()
            generation.began = self.now
            self._prepare(generation)

    def _prepare(self, generation: _SimulatedGeneration) -> None:
        """Let mixlm prepare the next request when one of its processes is free."""
        if self._free == 0:
            self._to_prepare.append(generation)
            return
        self._free -= 1
        self.router_worked += self._router.seconds
        self._at(self._router.seconds, lambda: self._prepared(generation))

    def _prepared(self, generation: _SimulatedGeneration) -> None:
        self._free += 1
        if self._to_prepare:
            self._prepare(self._to_prepare.popleft())
        request = self._next_request(generation)
        self._at(self._router.delay / 2, lambda: self._enqueue(request))

    def _next_request(self, generation: _SimulatedGeneration) -> _SimulatedRequest:
        """Sample coins, and merge equal ones where the member's server samples runs itself."""
        if generation.owed == 0:
            self._sample_coin(generation)
        member = generation.member
        steps = generation.owed if self._costs[member].runs else 1
        generation.owed -= steps
        while self._costs[member].runs and steps < generation.left:
            self._sample_coin(generation)
            if generation.member != member:
                break
            steps += generation.owed
            generation.owed = 0
        steps = min(steps, generation.left)
        text = self.load.prompt + generation.length - generation.left
        return _SimulatedRequest(generation, member, max(text - generation.read[member], 1), steps)

    def _sample_coin(self, generation: _SimulatedGeneration) -> None:
        generation.member = int(np.searchsorted(self._chances, self._random.random(), side="right"))
        generation.owed = 1 if self.load.coin <= 1 else int(self._random.geometric(1 / self.load.coin))

    def _enqueue(self, request: _SimulatedRequest) -> None:
        generation, member = request.generation, request.member
        machine = generation.homes[member]
        if machine is None:
            machine = min(self.machines[member], key=lambda machine: machine.homes)
            machine.homes += 1
            generation.homes[member] = machine
        machine.queues.setdefault(member, deque()).append(request)
        self._work_soon(machine)

    def _work_soon(self, machine: _SimulatedMachine) -> None:
        if not machine.working:
            self._at(0.0, lambda: self._work(machine), last=True)

    def _work(self, machine: _SimulatedMachine) -> None:
        """Begin a forward, if there is something to do and the machine is free."""
        if machine.working:
            return
        sizes = {
            member: len(queue) + len(machine.going.get(member, ()))
            for member, queue in machine.queues.items()
            if queue or machine.going.get(member)
        }
        if not sizes:
            return
        member = max(sizes, key=lambda name: sizes[name])
        cost, queue = self._costs[member], machine.queues[member]
        batch = machine.going.setdefault(member, [])
        while queue and len(batch) < cost.slots:
            batch.append(queue.popleft())
        seconds = cost.seconds(len(batch), sum(request.tokens for request in batch))
        machine.working = True
        machine.worked += seconds
        self._at(seconds, lambda: self._worked(machine, member))

    def _worked(self, machine: _SimulatedMachine, member: int) -> None:
        machine.working = False
        batch, going = machine.going[member], []
        for request in batch:
            request.tokens, request.steps = 1, request.steps - 1
            if request.generation.first == 0.0:
                request.generation.first = self.now + self._router.delay / 2
            request.generation.left -= 1
            if request.steps > 0:
                going.append(request)
            else:
                self._at(self._router.delay / 2, lambda request=request: self._completed(request))  # type: ignore[misc]
        machine.going[member] = going
        self.wrote.append((self.now, len(batch)))
        self._work_soon(machine)

    def _completed(self, request: _SimulatedRequest) -> None:
        generation = request.generation
        generation.read[request.member] = self.load.prompt + generation.length - generation.left - 1
        if generation.left > 0:
            self._prepare(generation)
            return
        self.done.append((generation, self.now))
        for machine in generation.homes:
            if machine is not None:
                machine.homes -= 1
        self._in_progress -= 1
        if self.load.rate is None and self._come < self._total:
            self._arrive()
        self._admit()


def simulate(costs: PlanCosts, load: Workload, *, count: int = 1000, seed: int = 0) -> SimulationResult:
    """Let `count` completions come and be written."""
    simulation = _Simulation(costs, load, count, seed)
    simulation.run()
    times = np.array([when for when, _ in simulation.wrote])
    counts = np.cumsum([number for _, number in simulation.wrote])
    # While completions come: what is left after the last of them is written by ever fewer at once.
    close = simulation.last_came or min(end for _, end in simulation.done)
    begin = close / 5
    before, within = np.searchsorted(times, (begin, close), side="right")
    tokens = counts[max(within - 1, 0)] - (counts[before - 1] if before else 0)
    steady = sorted(simulation.done, key=lambda entry: entry[0].came)[len(simulation.done) // 5 :]
    lengths = np.mean([generation.length for generation, _ in simulation.done])
    worked, router, span = simulation.worked_then, simulation.router_then, simulation.last_came
    if span == 0:
        worked = [[machine.worked for machine in group] for group in simulation.machines]
        router, span = simulation.router_worked, simulation.now or 1.0
    return SimulationResult(
        tokens_per_second=float(tokens / (close - begin)) if close > begin else 0.0,
        completions_per_second=float(tokens / (close - begin) / lengths) if close > begin else 0.0,
        first=np.array([generation.first - generation.came for generation, _ in steady]),
        whole=np.array([end - generation.came for generation, end in steady]),
        waited=np.array([generation.began - generation.came for generation, _ in steady]),
        busy={name: [seconds / span for seconds in times] for name, times in zip(costs.members, worked, strict=True)},
        router=router / span / costs.router.processes,
        late=simulation.late / count,
    )


def quantiles(values: np.ndarray, shares: Sequence[float] = (0.5, 0.95)) -> list[float]:
    """Return quantiles of times; zeros where there are none."""
    return [float(quantile) for quantile in np.quantile(values, shares)] if values.size else [0.0] * len(shares)
