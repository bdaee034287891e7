"""What engines that report only their likeliest tokens have reported at one position, and what they leave open.

A member is asked for `top_k_limit` tokens first, and for more as long as a position is not decided. What was reported
once stays, so that the bounds of a rule only rise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mixlm.core.combinations.base import Unreported
from mixlm.generation.member import Member
from mixlm.types import Candidates, Floats, Ids, LogitsRow, TopKFilter

_GROWTH = 4


class TokenReport:
    """What one member has reported at a position.

    Attributes:
        top_k_filter: What is requested of it next.
        tokens: The ids reported so far, with their log-probabilities in the whole vocabulary.
        is_whole: Whether nothing is left out.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        assert member.transform.top_k_filter is not None
        self.top_k_filter = member.transform.top_k_filter
        self.tokens = Candidates(np.zeros(0, dtype=np.int64), np.zeros(0))
        self.is_whole = False

    def add(self, row: LogitsRow) -> None:
        """Take a report: of more tokens than the one before."""
        assert isinstance(row, Candidates)
        new = ~np.isin(row.ids, self.tokens.ids)
        self.tokens = Candidates(
            np.concatenate([self.tokens.ids, row.ids[new]]), np.concatenate([self.tokens.logprobs, row.logprobs[new]])
        )
        size = self.member.engine.vocabulary.size
        sampled = np.count_nonzero(self.member.symbols[self.tokens.ids] >= 0)
        is_all = self.member.engine.reports_all and self.top_k_filter.k >= size
        self.is_whole = is_all or sampled == np.count_nonzero(self.member.symbols >= 0)

    def part(self, distribution: Candidates) -> Candidates:
        """Return what is known of the member's distribution: normalised where nothing is left out."""
        if not self.is_whole or not distribution.ids.size:
            return distribution
        return Candidates(distribution.ids, distribution.logprobs - np.logaddexp.reduce(distribution.logprobs))

    def grow(self) -> bool:
        """Request more tokens next. Returns whether the engine has more."""
        engine, count = self.member.engine, self.top_k_filter.k
        limit = engine.vocabulary.size if engine.max_top_k is None else engine.max_top_k
        if self.is_whole or count >= limit:
            return False
        self.top_k_filter = TopKFilter(min(_GROWTH * count, limit), self.top_k_filter.banned, normalized=True)
        return True

    def may_be_unreported(self, symbols: Ids) -> npt.NDArray[np.bool_]:
        """Return whether the member has tokens of each symbol that it did not report, bool (symbols,)."""
        own = self.member.symbols[self.tokens.ids]
        per_symbol = self.member.tokens_per_symbol
        left = np.append(per_symbol - np.bincount(own[own >= 0], minlength=per_symbol.size), 0)
        return np.asarray(left[np.minimum(symbols, per_symbol.size)] > 0)


def unreported(reports: Mapping[int, TokenReport], symbols: Ids, probs: Floats, *, of_unit: bool) -> Unreported | None:
    """Return what rows leave open; None where all are whole.

    Args:
        reports: By row, of the members that ran and report their likeliest tokens alone.
        symbols: int64 (symbols,).
        probs: float64 (members, symbols).
        of_unit: Whether the symbols are the unit's. If not, all that was not reported is open.
    """
    partial = {row: report for row, report in reports.items() if not report.is_whole}
    if not partial:
        return None
    if not of_unit:
        return Unreported.of(probs, list(partial))
    open_symbols = np.zeros(probs.shape, dtype=np.bool_)
    for row, report in partial.items():
        open_symbols[row] = report.may_be_unreported(symbols)
    tokens = max(int(report.member.tokens_per_symbol.max()) for report in partial.values())
    return Unreported.of(probs, list(partial), open_symbols, tokens)
