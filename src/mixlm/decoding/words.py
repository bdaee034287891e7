"""`mixture` in the unit `word`: draw a member at the end of each word, and let it write the next.

At a place in the text, the member whose word it is draws from its own law. A symbol that goes on with the word is
written. A symbol that begins a word says that the word has ended: a coin is drawn for the next. Where it falls on the
same member, the symbol stands, for given that it begins a word it follows that member's law of such symbols. Where it
falls on another, that one draws from its own law given that a word begins; with noise of its own, since to have seen
the first member's draw says something about the first noise.

The symbols that a member's truncation leaves may all go on with the word. Then those that do not begin one are masked
before truncation. Where a model gives none of them any probability, the symbol of the first member stands.

A word costs one forward more than its symbols where it changes the member: the one that found the last word's end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from mixlm.decoding.base import Choice, Flow, Step, View
from mixlm.engines.base import Draw, Drawn
from mixlm.noise import Noise
from mixlm.sampling import Candidates, Logits
from mixlm.vocab.words import WordState


def words(step: Step) -> Flow:
    """Draw from the member whose word it is, and from the next one where the word has ended."""
    coin = step.noise.choice(step.weights)
    state = cast(WordState, step.views[0].state)
    z = coin if state.owner is None else state.owner
    [drawn] = yield [Draw(z, step.views[z].ids(), step.views[z].draw(step.noise))]
    if z == coin or not state.begins(np.array([drawn.symbol]))[0]:
        return [Choice(drawn.symbol, z, drawn.logprob, drawn.likeliest)]
    view = step.views[coin]
    [anew] = yield [Draw(coin, view.ids(), _beginning(view, step.noise.again(), drawn))]
    return [Choice(anew.symbol, z if anew is drawn else coin, anew.logprob, anew.likeliest)]


def _beginning(view: View, noise: Noise, otherwise: Drawn) -> Callable[[Logits], Drawn]:
    """Return the function that draws a symbol that begins a word from a member's logits, if there is one."""
    state = cast(WordState, view.state)
    law = view.law_here()

    def choose(logits: Logits) -> Drawn:
        symbols, logprobs = law(logits)
        kept = state.begins(symbols)
        if not kept.any():
            allowed = (view.member.symbols >= 0) & state.begins(view.member.symbols)
            masked = np.where(allowed, logits, -np.inf)
            if not np.isfinite(masked).any():
                return otherwise
            symbols, logprobs = law(masked)
            kept = np.isfinite(logprobs)
        symbols, logprobs = symbols[kept], logprobs[kept]
        top = logprobs.max()
        logprobs = logprobs - top - np.log(np.exp(logprobs - top).sum())
        return view.drawn(Candidates(symbols, logprobs), noise)

    return choose
