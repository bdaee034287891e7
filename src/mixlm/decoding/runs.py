"""Runs: a member whose engine draws by itself is asked for several tokens at once.

The coins of the next positions are numbers known beforehand, so they say how long a member goes on writing: consecutive
equal coins are one request. Nothing of the law changes. The run is cut where a coin falls on another member after all
(weights may depend on what was written), where the text ends or is full, and where the member would read what it wrote
in other tokens: all of these follow from the coins and the tokens before the cut, and what lies behind it is forgotten,
so what is drawn there anew follows the law of its own place.
"""

from __future__ import annotations

from mixlm.decoding.base import Choice, Flow, Step
from mixlm.engines.base import Run
from mixlm.errors import EngineError

LONGEST = 16  # tokens of one request: a reader waits for all of them


def written(step: Step, member: int, *, always: bool = False) -> Flow:
    """Let a member write as far as the coins fall on it; to the end of the reply where it is `always` the one."""
    view = step.views[member]
    length = min(step.most, LONGEST)
    if not always:
        length = _reach(step, member, length)
    ids = view.ids().copy()
    transform = view.member.transform
    seed = step.noise.for_engine()
    [run] = yield [Run(member, ids, length, transform.sampling, transform.banned, seed)]
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
        if not always and here.noise.choice(here.weights) != member:
            break
        step = here
    return choices


def _reach(step: Step, member: int, most: int) -> int:
    """Return how many coins fall on a member one after the other with the weights of this place; 1 to `most`."""
    noise = step.noise
    for ahead in range(1, most):
        if noise.at(noise.position + ahead).choice(step.weights) != member:
            return ahead
    return most
