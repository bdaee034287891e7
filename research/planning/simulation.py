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
        reply: Mean tokens of a completion.
        at_once: Completions generated together at most.
        lengths: Whether all completions have the mean length, or a geometric distribution of lengths.
        coin: Mean tokens that one coin decides; more than 1 for words.
    """

    rate: float | None
    prompt: int
    reply: float
    at_once: int = 16
    lengths: Lengths = "geometric"
    coin: float = 1.0


@dataclass(frozen=True)
class SimulationResult:
    """The result for the completions after the first fifth, in seconds.

    Args:
        tokens_per_second: Throughput.
        replies_per_second: Completions per second.
        first: Time to the first token of each completion, waiting included.
        whole: Time to its last token.
        waited: Time until its turn.
        busy: The share of time that each of a member's machines worked.
        router: The share of time that mixlm worked.
        late: The share of completions that had not begun when the last one arrived.
    """

    tokens_per_second: float
    replies_per_second: float
    first: np.ndarray
    whole: np.ndarray
    waited: np.ndarray
    busy: dict[str, list[float]]
    router: float
    late: float


@dataclass(eq=False)
class _SimulatedReply:
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
    reply: _SimulatedReply
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

    def __init__(self, costs: PlanCosts, load: Workload, replies: int, seed: int) -> None:
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
        self._total = replies
        self._come = self._in_progress = 0
        self._waiting: deque[_SimulatedReply] = deque()
        self._free = self._router.processes
        self._to_prepare: deque[_SimulatedReply] = deque()
        self.router_worked = 0.0
        self.done: list[tuple[_SimulatedReply, float]] = []
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
        """Let something happen later. last: behind all else that happens at that time."""
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, last, self._count, event))

    def _arrive_and_next(self) -> None:
        self._arrive()
        if self._come < self._total:
            assert self.load.rate is not None
            self._at(self._random.exponential(1 / self.load.rate), self._arrive_and_next)

    def _arrive(self) -> None:
        self._come += 1
        mean = self.load.reply
        length = max(1, round(mean)) if self.load.lengths == "fixed" else int(self._random.geometric(1 / max(mean, 1)))
        members = len(self._costs)
        self._waiting.append(_SimulatedReply(self.now, length, [0] * members, length, [None] * members))
        self._admit()
        if self._come == self._total:
            self.late, self.last_came = len(self._waiting), self.now
            self.worked_then = [[machine.worked for machine in those] for those in self.machines]
            self.router_then = self.router_worked

    def _admit(self) -> None:
        while self._waiting and self._in_progress < self.load.at_once:
            self._in_progress += 1
            reply = self._waiting.popleft()
            reply.began = self.now
            self._prepare(reply)

    def _prepare(self, reply: _SimulatedReply) -> None:
        """Let mixlm put the next question, when one of its processes is free."""
        if self._free == 0:
            self._to_prepare.append(reply)
            return
        self._free -= 1
        self.router_worked += self._router.seconds
        self._at(self._router.seconds, lambda: self._prepared(reply))

    def _prepared(self, reply: _SimulatedReply) -> None:
        self._free += 1
        if self._to_prepare:
            self._prepare(self._to_prepare.popleft())
        question = self._question(reply)
        self._at(self._router.delay / 2, lambda: self._ask(question))

    def _question(self, reply: _SimulatedReply) -> _SimulatedRequest:
        """Sample coins, and merge equal ones where the member's server writes runs."""
        if reply.owed == 0:
            self._draw(reply)
        member = reply.member
        steps = reply.owed if self._costs[member].runs else 1
        reply.owed -= steps
        while self._costs[member].runs and steps < reply.left:
            self._draw(reply)
            if reply.member != member:
                break
            steps += reply.owed
            reply.owed = 0
        steps = min(steps, reply.left)
        text = self.load.prompt + reply.length - reply.left
        return _SimulatedRequest(reply, member, max(text - reply.read[member], 1), steps)

    def _draw(self, reply: _SimulatedReply) -> None:
        reply.member = int(np.searchsorted(self._chances, self._random.random(), side="right"))
        reply.owed = 1 if self.load.coin <= 1 else int(self._random.geometric(1 / self.load.coin))

    def _ask(self, question: _SimulatedRequest) -> None:
        reply, member = question.reply, question.member
        machine = reply.homes[member]
        if machine is None:
            machine = min(self.machines[member], key=lambda one: one.homes)
            machine.homes += 1
            reply.homes[member] = machine
        machine.queues.setdefault(member, deque()).append(question)
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
        member = max(sizes, key=lambda one: sizes[one])
        cost, queue = self._costs[member], machine.queues[member]
        batch = machine.going.setdefault(member, [])
        while queue and len(batch) < cost.slots:
            batch.append(queue.popleft())
        seconds = cost.seconds(len(batch), sum(one.tokens for one in batch))
        machine.working = True
        machine.worked += seconds
        self._at(seconds, lambda: self._worked(machine, member))

    def _worked(self, machine: _SimulatedMachine, member: int) -> None:
        machine.working = False
        batch, going = machine.going[member], []
        for one in batch:
            one.tokens, one.steps = 1, one.steps - 1
            if one.reply.first == 0.0:
                one.reply.first = self.now + self._router.delay / 2
            one.reply.left -= 1
            if one.steps > 0:
                going.append(one)
            else:
                self._at(self._router.delay / 2, lambda one=one: self._answered(one))  # type: ignore[misc]
        machine.going[member] = going
        self.wrote.append((self.now, len(batch)))
        self._work_soon(machine)

    def _answered(self, question: _SimulatedRequest) -> None:
        reply = question.reply
        reply.read[question.member] = self.load.prompt + reply.length - reply.left - 1
        if reply.left > 0:
            self._prepare(reply)
            return
        self.done.append((reply, self.now))
        for machine in reply.homes:
            if machine is not None:
                machine.homes -= 1
        self._in_progress -= 1
        if self.load.rate is None and self._come < self._total:
            self._arrive()
        self._admit()


def simulate(costs: PlanCosts, load: Workload, *, replies: int = 1000, seed: int = 0) -> SimulationResult:
    """Let `replies` completions come and be written."""
    one = _Simulation(costs, load, replies, seed)
    one.run()
    times = np.array([when for when, _ in one.wrote])
    counts = np.cumsum([number for _, number in one.wrote])
    # While completions come: what is left behind the last of them is written by ever fewer at once.
    close = one.last_came or min(end for _, end in one.done)
    begin = close / 5
    before, within = np.searchsorted(times, (begin, close), side="right")
    tokens = counts[max(within - 1, 0)] - (counts[before - 1] if before else 0)
    steady = sorted(one.done, key=lambda entry: entry[0].came)[len(one.done) // 5 :]
    lengths = np.mean([reply.length for reply, _ in one.done])
    worked, router, span = one.worked_then, one.router_then, one.last_came
    if span == 0:
        worked = [[machine.worked for machine in those] for those in one.machines]
        router, span = one.router_worked, one.now or 1.0
    return SimulationResult(
        tokens_per_second=float(tokens / (close - begin)) if close > begin else 0.0,
        replies_per_second=float(tokens / (close - begin) / lengths) if close > begin else 0.0,
        first=np.array([reply.first - reply.came for reply, _ in steady]),
        whole=np.array([end - reply.came for reply, end in steady]),
        waited=np.array([reply.began - reply.came for reply, _ in steady]),
        busy={name: [seconds / span for seconds in those] for name, those in zip(costs.members, worked, strict=True)},
        router=router / span / costs.router.processes,
        late=one.late / replies,
    )


def quantiles(values: np.ndarray, shares: Sequence[float] = (0.5, 0.95)) -> list[float]:
    """Return quantiles of times; zeros where there are none."""
    return [float(one) for one in np.quantile(values, shares)] if values.size else [0.0] * len(shares)
