"""Runs: consecutive equal coins, and what an engine is told of them.

A member whose engine draws by itself is asked for several tokens at once. Another is asked for one after the other,
and its engine may be told what comes next, so that it can go on before it is asked.

The coins of the next positions are numbers known beforehand, so they say how long a member goes on writing: consecutive
equal coins are one request. Nothing of the law changes. The run is cut where a coin falls on another member after all
(weights may depend on what was written), where the text ends or is full, and where the member would read what it wrote
in other tokens: all of these follow from the coins and the tokens before the cut, and what lies behind it is forgotten,
so what is drawn there anew follows the law of its own place.
"""

from __future__ import annotations

from mixlm.engines.base import GenerateRequest, RunAheadHint, SampleRequest
from mixlm.errors import EngineError
from mixlm.generation.sequence import Choice, DecodeStep, Flow

LONGEST = 16  # tokens of one request: a reader waits for all of them


def generate_run(step: DecodeStep, member: int, *, always: bool = False) -> Flow:
    """Let a member write as far as the coins fall on it; to the end of the reply where it is `always` the one."""
    view = step.views[member]
    length = min(step.max_symbols, LONGEST)
    if not always:
        length = _reach(step, member, length)
    ids = view.ids().copy()
    transform = view.member.transform
    seed = step.noise.engine_seed()
    [run] = yield [GenerateRequest(member, ids, length, transform.sampling, transform.banned, seed)]
    choices: list[Choice] = []
    read = ids.tolist()
    for token, logprob in zip(run.ids, run.logprobs, strict=True):
        symbol = view.symbol(token)
        if symbol < 0:
            raise EngineError(f"{view.member.name} drew the token {token}, which it may not draw")
        choices.append(Choice(symbol, member, logprob))
        read.append(token)
        here = step.push(symbol)
        if here is None or view.ids().tolist() != read:
            break
        if not always and here.noise.coin(here.weights) != member:
            break
        step = here
    return choices


def sample_request(step: DecodeStep, member: int, *, always: bool = False) -> SampleRequest:
    """Ask a member for the symbol of a position, and tell its engine of those behind it, where it wants to know.

    always: the coins are on this member to the end of the reply.
    """
    view, noise = step.views[member], step.noise
    reach = min(view.member.run_ahead + 1, step.max_symbols)
    if reach > 1 and not always:
        reach = _reach(step, member, reach)
    ahead = None
    if reach > 1:
        keys = tuple(noise.at(noise.position + further).sample_key for further in range(reach - 1))
        ahead = RunAheadHint(keys, view.member.transform.sampling, view.member.symbols)
    return SampleRequest(member, view.ids(), view.sampler(noise), view.top_k_filter, ahead)


def _reach(step: DecodeStep, member: int, most: int) -> int:
    """Return how many coins fall on a member one after the other with the weights of this place; 1 to `most`."""
    noise = step.noise
    for ahead in range(1, most):
        if noise.at(noise.position + ahead).coin(step.weights) != member:
            return ahead
    return most
