"""One position of a text under a combination rule: which members it needs, and the symbol that they decide.

What is decided depends on the members' distributions, the order and the noise of the position, not on which members
have run: one that ran early, as a draft does, is not looked at before its turn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from mixlm.core.combinations.base import TOLERANCE, Aligned, Combination, Unreported, align
from mixlm.decoding.blocks import Position
from mixlm.decoding.reports import TokenReport, unreported
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.sequence import Choice, DecodeStep
from mixlm.generation.target import RuleTarget, support
from mixlm.types import Candidates, Floats, Ids, LogitsRow

_CHECKED = 4  # positions of a text at which the bounds of a user's rule are checked first, and then one in _INTERVAL
_INTERVAL = 16
_REPORT_TOLERANCE = 1e-3  # reports of one position come from several forwards, each rounded in its own way

Decision = tuple[int, float, int]  # a symbol, a lower bound of its log-probability, and the row that it is from


class RulePosition(Position):
    """What positions of a rule share, sampled or greedy.

    Args:
        step: The decode step.
        target: The rule.
        complete: Run every member, also where fewer decide: for `top_logprobs`, or to check the rule's bounds.
        together: Run the members that are missing at once, not one after another.
    """

    def __init__(self, step: DecodeStep, target: RuleTarget, *, complete: bool = False, together: bool = False) -> None:
        members = target.members(step)
        self.reports = {
            member: TokenReport(step.views[member].member) for member in members if step.views[member].member.is_partial
        }
        self._distributions: dict[int, Callable[[LogitsRow], Candidates]] = {}
        self.target = target
        super().__init__(step, members)
        self.weights = target.weights(step, members)
        self.stages: list[list[int]] = [list(range(len(members)))]  # rows, in the order in which they are looked at
        self._stage = 0
        self._complete = complete or bool(step.views[0].member.top_logprobs)
        self._together = together
        self._decided: Decision | None = None

    def _read(self, member: int) -> None:
        super()._read(member)
        self._distributions[member] = self.target.distribution(self.step, member, normalize=False)

    def needs(self) -> Sequence[int]:
        """Return the members of the next stage that have not run, or have to report more; or those of all stages."""
        if self.choice is not None:
            return ()
        stages = self.stages[self._stage :]
        rows = [row for stage in (stages if self._together or self._decided else stages[:1]) for row in stage]
        return [self.members[row] for row in rows if self.members[row] not in self.parts]

    def advance(self) -> None:
        """Look at one stage after another, as far as its members have run."""
        while self.choice is None and all(self.members[row] in self.parts for row in self.stages[self._stage]):
            for row in self.stages[self._stage]:
                member, report = self.members[row], self.reports.get(self.members[row])
                if report is None or report.is_whole:  # others may grow, and run again
                    self.step.views[member].check_possible(self.parts[member])
            self._stage += 1
            if self._stage == len(self.stages):
                if all(report.is_whole for report in self.reports.values()):
                    self._choose([self.parts[member] for member in self.members])
                elif (decided := self.decide_by_reports(range(len(self.members)))) is not None:
                    self._take(decided)
                else:
                    self._request_more()
            elif self._decided is None:
                self._decided = self.decide([row for stage in self.stages[: self._stage] for row in stage])
                if self._decided is not None and not self._complete:
                    self._take(self._decided)

    def _take(self, decided: Decision) -> None:
        symbol, logprob, row = decided
        self.choice = Choice(self.target.symbol(self.step, symbol), self.members[row], logprob)

    def _request_more(self) -> None:
        """Wait for more of what members report. Raises UnsupportedError where no engine reports more."""
        growing = [member for member, report in self.reports.items() if report.grow()]
        if not growing:
            shown = [
                f"the {report.tokens.ids.size} likeliest tokens of {self.step.views[member].member.name}"
                for member, report in self.reports.items()
                if not report.is_whole
            ]
            raise UnsupportedError(
                f"rule {self.target.rule.name} is not decided at this position by {' and '.join(shown)}, and the engine"
                " reports no more: nothing is sampled",
                "let its server report more, or use --engine hf (engine='hf')",
            )
        for member in growing:
            del self.parts[member]
        self.stages, self._stage = [list(range(len(self.members)))], 0

    def receive(self, member: int, logits: LogitsRow) -> None:
        """Take a member's logits, or what it reports of them."""
        distribution, report = self._distributions[member], self.reports.get(member)
        if report is None:
            self.parts[member] = distribution(logits)
        else:
            report.add(logits)
            self.parts[member] = report.part(distribution(report.tokens))

    def request(self, member: int) -> LogitsRequest:
        """Return the request for a member's logits, or for as many tokens as its report is to have."""
        request, report = super().request(member), self.reports.get(member)
        return request if report is None else replace(request, top_k_filter=report.top_k_filter)

    def guess(self, member: int) -> int | None:
        """Return the symbol that the member alone would choose."""
        part = self.parts.get(member)
        return None if part is None or not part.ids.size else self.target.symbol(self.step, self.pick(part))

    @abstractmethod
    def pick(self, distribution: Candidates) -> int:
        """Return the symbol of a distribution."""

    @abstractmethod
    def decide(self, rows: Sequence[int]) -> Decision | None:
        """Return what these rows decide; None for nothing."""

    def decide_by_reports(self, rows: Sequence[int]) -> Decision | None:
        """Do what `decide` does, where every member has run and some have not reported everything."""
        return self.decide(rows)

    def decide_all(self, distribution: Candidates) -> int:
        """Return the symbol where every member has run and fewer have not decided it."""
        return self.pick(distribution)

    @abstractmethod
    def check(self, distribution: Candidates) -> None:
        """Check the bounds of the rule against its distribution. Raises ConfigError."""

    def known(self, rows: Sequence[int]) -> Aligned:
        """Return the distributions of these rows; the others are 0."""
        return align([self.parts[member] if row in rows else None for row, member in enumerate(self.members)])

    @cached_property
    def known_all(self) -> Aligned:
        """The distributions of all members, once each is whole."""
        return self.known(range(len(self.members)))

    def unreported(self, rows: Sequence[int], known: Aligned) -> Unreported | None:
        """Return what these rows leave open; None for nothing."""
        reports = {row: self.reports[member] for row in rows if (member := self.members[row]) in self.reports}
        return unreported(reports, *known, of_unit=self.target.combines_symbols)

    def is_open(self, rows: Sequence[int]) -> bool:
        """Whether it is plain to see that these rows decide nothing."""
        return not self.reports and self.target.rule.is_open(
            {row: self.parts[self.members[row]] for row in rows}, self.weights
        )

    def _require(self, holds: bool) -> None:
        if not holds:
            raise ConfigError(
                f"the bounds of rule {self.target.rule.name} exceed what it combines: its text would follow another "
                "distribution",
                "an envelope is never larger than the rule, whatever the other members say; mixlm check tests it",
            )

    def _choose(self, parts: Sequence[Candidates]) -> None:
        target = self.target
        distribution = target.combine(self.members, parts, self.weights, lambda: self.known_all)
        if self._decided is None:
            symbol = self.decide_all(distribution)
        else:
            self.check(distribution)
            symbol = self._decided[0]
        index = int(np.argmax(distribution.ids == symbol))
        top_logprobs = tuple((target.symbol(self.step, top), p) for top, p in self.step.top_logprobs(distribution))
        member = self.members[target.contributor(symbol, parts, self.weights)]
        logprob = float(distribution.logprobs[index])
        self.choice = Choice(target.symbol(self.step, symbol), member, logprob, top_logprobs)


class SampledPosition(RulePosition):
    """A position whose symbol is sampled: coin first, by the envelope, or from all members.

    Args:
        order: The members in the order in which the envelope looks at them; None for a rule without one.
        dense: Sample from all members, whatever fewer would decide: the reference.

    Attributes:
        first: The member that is looked at first.
        first_mass: The mass with which it decides alone; None before it ran.
    """

    def __init__(
        self,
        step: DecodeStep,
        target: RuleTarget,
        order: Sequence[int] | None = None,
        *,
        dense: bool = False,
        complete: bool = False,
        together: bool = False,
    ) -> None:
        super().__init__(step, target, complete=complete, together=together)
        self.first: int | None = None
        self.first_mass: float | None = None
        self._stopping: dict[int, tuple[Ids, Floats]] = {}  # by row, what `_first_distribution` returns
        self._bounds: tuple[Ids, Floats] | None = None  # symbols and what was emitted up to the last envelope
        self._coin = target.rule.first_member(self.weights) if target.has_bounds and not dense else None
        if self._coin is not None:
            first = step.noise.coin(self._coin)
            rest = [row for row in range(len(self.members)) if row != first]
            self.stages = [[first], *([rest] if rest else [])]
            self._uniform = step.noise.next_round().uniform()
        elif order is not None:
            self.stages = [[self.members.index(member)] for member in order if member in self.members]
            self._uniform = step.noise.uniform()
        if len(self.stages) > 1:
            self.first = self.members[self.stages[0][0]]
        elif self._coin is not None:
            self.stages.append([])  # a member alone may be undecided, too

    def pick(self, distribution: Candidates) -> int:
        """Sample with the noise of the position."""
        return int(distribution.ids[self.step.noise.sample(*distribution)])

    def decide(self, rows: Sequence[int]) -> Decision | None:
        """Stop with the probability of the sub-distribution that these rows know, and sample from what is new in it."""
        if self._coin is None:
            return self._by_envelope(rows, self._uniform)
        [row] = rows
        symbols, mass = self._first_distribution(row)
        self.first_mass = float(mass.sum())
        return self._sample_new(symbols, mass, float(self._coin[row]) * mass, row, self._uniform, self.first_mass)

    def decide_by_reports(self, rows: Sequence[int]) -> Decision | None:
        """Stop with the probability that reports of all members know, in envelopes that grow with the reports.

        After a coin, they grow from what the coin could emit, and another uniform number falls into the rest.
        """
        if self._coin is None:
            return self._by_envelope(rows, self.step.noise.uniform())
        if self._bounds is None:
            symbols = self.known(rows).symbols
            self._bounds = symbols, self._emitted(symbols)
            emitted = float(self._bounds[1].sum())
            rest = self.step.noise.next_round().next_round().uniform()
            self._uniform = emitted + (1 - emitted) * rest
        return self._by_envelope(rows, self._uniform)

    def _by_envelope(self, rows: Sequence[int], uniform: float) -> Decision | None:
        if self.is_open(rows):
            self.first_mass = self.first_mass or 0.0
            return None
        symbols, probs = known = self.known(rows)
        lower = self.target.rule.envelope(probs, self.weights, rows, self.unreported(rows, known))
        if lower is None:
            return None
        before = np.zeros(symbols.size) if self._bounds is None else _spread(symbols, *self._bounds)
        bound = np.maximum(lower, before)
        total = float(bound.sum())
        self._require(total <= 1 + _REPORT_TOLERANCE)
        self._bounds = symbols, bound
        if self.first_mass is None:
            self.first_mass = total
        return self._sample_new(symbols, bound - before, bound, rows[-1], uniform, total)

    def _sample_new(
        self, symbols: Ids, increment: Floats, bound: Floats, row: int, uniform: float, total: float
    ) -> Decision | None:
        """Sample from an increment where the uniform number falls below the total."""
        new = support(symbols, increment)
        if uniform >= total or not new.ids.size:
            return None
        symbol = self.pick(new)
        return symbol, float(np.log(bound[symbols == symbol].sum())), row

    def _first_distribution(self, row: int) -> tuple[Ids, Floats]:
        """Return the symbols of a member's distribution, and the sub-distribution with which it may stop alone."""
        if row not in self._stopping:
            part, report = self.parts[self.members[row]], self.reports.get(self.members[row])
            probs = np.exp(part.logprobs)
            reports = {} if report is None else {0: report}
            left = unreported(reports, part.ids, probs[None], of_unit=self.target.combines_symbols)
            self._stopping[row] = part.ids, self.target.rule.first_distribution(probs, self.weights, row, left)
        return self._stopping[row]

    def _emitted(self, symbols: Ids) -> Floats:
        """Return `Σ π_i S_i`, what the coin could emit, over symbols that contain those of all members."""
        assert self._coin is not None
        out = np.zeros(symbols.size)
        for row, share in enumerate(self._coin):
            out += share * _spread(symbols, *self._first_distribution(row))
        return out

    def decide_all(self, distribution: Candidates) -> int:
        """Sample from what the stages before have left of the distribution."""
        rest = self._rest(distribution)
        return self.pick(rest if rest.ids.size else distribution)

    def check(self, distribution: Candidates) -> None:
        """Raise ConfigError where a bound exceeds the rule's distribution: what is sampled would be another one."""
        self._rest(distribution)

    def _rest(self, distribution: Candidates) -> Candidates:
        """Return `C − Σ π_i S_i`, or `C` without the last envelope: unnormalised, by its support."""
        if self._coin is None and (self._bounds is None or not self._bounds[1].any()):
            return distribution
        symbols = self.known_all.symbols
        target = _spread(symbols, distribution.ids, np.exp(distribution.logprobs))
        lower = self._emitted(symbols) if self._bounds is None else _spread(symbols, *self._bounds)
        self._require(bool((lower <= target + (_REPORT_TOLERANCE if self.reports else TOLERANCE)).all()))
        return support(symbols, target - lower)


class GreedyPosition(RulePosition):
    """A position whose symbol is the most likely one. Members come by weight, or in the order of their roles."""

    def __init__(self, step: DecodeStep, target: RuleTarget, *, together: bool = False) -> None:
        super().__init__(step, target, complete=checks_bounds(target.rule, step.noise.position), together=together)
        if target.has_bounds:
            self.stages = [[int(row)] for row in np.argsort(-self.weights, kind="stable")]
        if together and not self.reports:  # all run, so the log-probability can be the rule's, and no bound
            self._complete = True

    def decide(self, rows: Sequence[int]) -> Decision | None:
        """Return the symbol that wins whatever the other members say."""
        if self.is_open(rows):
            return None
        symbols, probs = known = self.known(rows)
        left = self.unreported(rows, known)
        winner = self.target.rule.certain_winner(probs, self.weights, rows, left)
        if winner is None:
            return None
        lower = self.target.rule.envelope(probs, self.weights, rows, left)
        with np.errstate(divide="ignore"):
            logprob = float("-inf") if lower is None else float(np.log(lower[winner]))
        shares = [self.weights[row] * probs[row, winner] for row in rows]
        return int(symbols[winner]), logprob, rows[int(np.argmax(shares))]

    def pick(self, distribution: Candidates) -> int:
        """Return the most likely symbol, the lowest of equally likely ones."""
        return int(distribution.ids[distribution.logprobs == distribution.logprobs.max()].min())

    def check(self, distribution: Candidates) -> None:
        """Raise ConfigError where another symbol is more likely than the one that was found certain."""
        assert self._decided is not None
        decided = distribution.logprobs[distribution.ids == self._decided[0]].max(initial=-np.inf)
        self._require(decided >= distribution.logprobs.max() - _REPORT_TOLERANCE)


def checks_bounds(rule: Combination, position: int) -> bool:
    """Whether all members run at a position to check the bounds: those of users' rules are not proven."""
    module = type(getattr(rule, "rule", rule)).__module__
    is_proven = module.startswith("mixlm.") and not module.endswith(".function")
    return not is_proven and (position < _CHECKED or position % _INTERVAL == 0)


def _spread(symbols: Ids, ids: Ids, values: Floats) -> Floats:
    """Return the values of ids over symbols, which contain them and ascend; 0 for the others."""
    if np.array_equal(symbols, ids):
        return values
    out = np.zeros(symbols.size)
    out[np.searchsorted(symbols, ids)] = values
    return out
