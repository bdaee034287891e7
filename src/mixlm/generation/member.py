"""A member's part in an ensemble: what turns its logits into a distribution over shared symbols."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixlm.core.grammar import Grammar, TokenMask
from mixlm.core.mixing import pool
from mixlm.core.sampling import TokenHistory, Transform
from mixlm.engines.base import Engine
from mixlm.errors import UnsupportedError
from mixlm.types import Candidates, Ids, LogitsRow
from mixlm.units.base import mark_duplicates


@dataclass(frozen=True, slots=True)
class MemberOptions:
    """How a member is asked. alternatives: how many of the likeliest symbols are told beside a chosen one.

    grammar: what its tokens are held to. alone: whether the strategy asks it for nothing but what it draws itself.
    """

    top_logprobs: int = 0
    grammar: Grammar | None = None
    samples_only: bool = False


class Member:
    """One member's part in an ensemble, the same for every sequence: its engine, its transform `A_i`, its map `K_i`.

    symbols: the shared symbol of each of its ids, int64 (vocab,), -1 for those it may not draw. Where it is asked
    alone, it `writes` runs, if its engine does. ahead: how many positions behind one in question its engine is told of.
    """

    def __init__(
        self, engine: Engine, name: str, transform: Transform, symbols: Ids, options: MemberOptions = MemberOptions()
    ) -> None:
        self.engine = engine
        self.name = name
        self.transform = transform
        self.symbols = symbols
        self.top_logprobs = options.top_logprobs
        self.grammar = options.grammar
        # Whoever can write any byte can go on with any text.
        self.may_be_stuck = options.grammar is not None and bool(
            (options.grammar.byte_ids < 0).any() or (symbols[options.grammar.byte_ids] < 0).any()
        )
        self._doubled = mark_duplicates(symbols)
        self.samples_itself = options.samples_only and engine.samples_itself(transform.sampling, transform.banned)
        # What is drawn from a whole row is not drawn where the row was computed.
        self.run_ahead = engine.run_ahead_depth if options.samples_only and transform.top_k_filter is not None else 0
        if not self.samples_itself:
            _check_candidates(self)

    def distribution(
        self, logits: LogitsRow, history: TokenHistory | None = None, allowed: TokenMask | None = None
    ) -> Candidates:
        """Return `K_i A_i p_i`: the member's distribution over shared symbols, from its logits, whole or cut."""
        return self.map_to_symbols(self.transform(logits, history, allowed))

    def map_to_symbols(self, own: Candidates) -> Candidates:
        """Return a distribution over shared symbols from one over the member's ids: the map `K_i`."""
        ids, logprobs = own
        symbols = self.symbols[ids]
        twice = self._doubled[ids]
        if not twice.any():
            return Candidates(symbols, logprobs)
        joined = pool(symbols[twice], logprobs[twice])
        return Candidates(
            np.concatenate([symbols[~twice], joined.ids]), np.concatenate([logprobs[~twice], joined.logprobs])
        )


def _check_candidates(member: Member) -> None:
    """Raise UnsupportedError for options that need more of a member than the likeliest tokens its engine tells."""
    engine, transform, symbols = member.engine, member.transform, member.symbols
    if engine.top_k_limit is None:
        return
    tokens, ends = engine.vocabulary.tokens, engine.vocabulary.end_ids
    # Tokens that the engine counts among its likeliest, and that may not be drawn here.
    unshared = sum(bool(tokens[i]) or i in ends for i in np.flatnonzero(symbols < 0).tolist())
    most = engine.top_k_limit - unshared
    sampling = transform.sampling
    if member.grammar is not None:
        found = "json_schema allows tokens from anywhere in the vocabulary"
    elif transform.bias is not None:
        found = "logit_bias moves tokens from anywhere in the vocabulary"
    elif sampling.has_penalties:
        found = f"{sampling.active_penalties[0]} moves tokens from anywhere in the vocabulary"
    elif not 1 <= sampling.top_k <= most:
        found = f"top_k is {sampling.top_k}" + (" (off)" if sampling.top_k == 0 else "")
    else:
        return
    raise UnsupportedError(
        f"{found}, and {engine.name} runs in an engine that tells its {engine.top_k_limit} likeliest tokens only",
        f"use a top_k from 1 to {most} and no penalties, biases or schema, or --engine hf (engine='hf')"
        if most >= 1
        else "use --unit piece, or --engine hf",
    )
