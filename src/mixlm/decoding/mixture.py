"""`mixture`: sample one member by its weight; only that member runs (paper, section 3.2, algorithm 2).

A run is a sequence of positions whose coins fall on one member. The coins are known before anything runs, so a member
whose engine samples itself generates a run in one request. Another engine is asked for one token at a time; a hint
tells it how the next ones will be sampled, so that it can run them before they are requested.

The distribution does not change. A run is cut where a coin falls on another member after all (weights may depend on the
text), where the text ends or the context is full, and where the member's canonical tokens for the text differ from
those it generated. All of these follow from the coins and the tokens before the cut; what follows it is dropped, so
what is sampled there anew follows the distribution of its own position.
"""

from __future__ import annotations

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.engines.requests import GenerateRequest, RunAheadHint, SampleRequest, SampleResponse
from mixlm.errors import EngineError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy

MAX_RUN = 16  # tokens of one request; a reader waits for all of them


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; it has no options."""
    return mixture


def mixture(step: DecodeStep) -> Flow:
    """Toss the coin `z ~ λ`, then sample a symbol from member z. The others catch up when their coin next falls.

    A member that the router observes has run by then, and its sample is free.
    """
    z = step.noise.coin(step.weights)
    if step.views[z].member.samples_itself:
        return (yield from generate_run(step, z))
    response = yield from sample_member(step, z)
    return [Choice(response.symbol, z, response.logprob, response.top_logprobs)]


def generate_run(step: DecodeStep, member: int) -> Flow:
    """Let a member generate as far as its coins reach."""
    view = step.views[member]
    length = run_length(step, member, min(step.max_symbols, MAX_RUN))
    ids = view.ids().copy()
    transform = view.member.transform
    seed = step.noise.engine_seed()
    [response] = yield [GenerateRequest(member, ids, length, transform.sampling, transform.banned, seed)]
    choices: list[Choice] = []
    generated = ids.tolist()
    for token, logprob in zip(response.ids, response.logprobs, strict=True):
        symbol = view.symbol(token)
        if symbol < 0:
            raise EngineError(f"{view.member.name} sampled the token {token}, which is masked here")
        choices.append(Choice(symbol, member, logprob))
        generated.append(token)
        if len(choices) == len(response.ids):
            break
        following = yield from step.following(symbol)
        if following is None or view.ids().tolist() != generated:
            break
        if following.noise.coin(following.weights) != member:
            break
        step = following
    return choices


def sample_request(step: DecodeStep, member: int) -> SampleRequest:
    """Return the request for one symbol, with a hint of the positions after it for engines that run ahead."""
    view, noise = step.views[member], step.noise
    length = run_length(step, member, min(view.member.run_ahead + 1, step.max_symbols))
    hint = None
    if length > 1:
        keys = tuple(noise.at(noise.position + offset).sample_key for offset in range(length - 1))
        hint = RunAheadHint(keys, view.member.transform.sampling, view.member.symbols)
    return SampleRequest(member, view.ids(), view.sampler(noise), view.top_k_filter, hint, view.allowed_ids())


def sample_member(step: DecodeStep, member: int) -> RequestFlow[SampleResponse]:
    """Sample one symbol from a member: from the logits that the router has observed, or with a request."""
    row = step.observed_row(member)
    if row is not None:
        return step.views[member].sampler(step.noise)(row)
    [response] = yield [sample_request(step, member)]
    sampled: SampleResponse = response
    return sampled


def run_length(step: DecodeStep, member: int, limit: int) -> int:
    """Return how many consecutive coins are known to fall on a member, with the weights of this position: 1 to `limit`.

    The next is not known before the router has observed its position, where it does.
    """
    noise = step.noise
    if step.observed is not None:
        return 1
    for offset in range(1, limit):
        if noise.at(noise.position + offset).coin(step.weights) != member:
            return offset
    return limit
