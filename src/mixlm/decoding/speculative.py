"""`speculative`: the mixture's text, with fewer forwards of the large members.

The coins of the next positions are tossed first. A draft proposes a symbol for each of them. Each member then verifies
the positions whose coin is its own, and only those, in the one forward in which it catches up anyway. The noise of a
position is a function of the position, so "accept with min(1, p/q), else sample from the residual" (Leviathan et al.,
2023; Chen et al., 2023) becomes: sample from the member's own distribution with the same noise, and accept where that
gives the same symbol. The text is exactly what `mixture` writes with this noise, whatever the draft proposed. (Where a
member's engine samples for `mixture`, with random numbers of its own, the distribution is the same, not the text.)

A block ends just before a position of another member: the forward that verifies the block yields that symbol too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import Position, block_strategy
from mixlm.decoding.drafts import Draft, build_draft
from mixlm.engines.requests import SampleRequest, SampleResponse
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, SpeculationStats, Strategy
from mixlm.types import LogitsRow


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy with the draft of the options, else the default draft."""
    return speculative(build_draft(options.draft, context), options.block, context.speculation)


def speculative(draft: Draft, block: int, stats: SpeculationStats | None = None) -> Strategy:
    """Return the strategy, arguments as of `block_strategy`; with a block of 0 it is the mixture itself."""
    return block_strategy(CoinPosition, draft, block, stats)


class CoinPosition(Position):
    """A position whose symbol is a sample of the member that the coin falls on."""

    def __init__(self, step: DecodeStep) -> None:
        self._samplers: dict[int, Callable[[LogitsRow], SampleResponse]] = {}
        super().__init__(step, [step.noise.coin(step.weights)])

    def _read(self, member: int) -> None:
        super()._read(member)
        self._samplers[member] = self.step.views[member].sampler(self.step.noise)

    def needs(self) -> Sequence[int]:
        """Return the coin's member until it has run."""
        return self.members if self.choice is None else ()

    def advance(self) -> None:
        """Do nothing: the symbol is chosen once its member has run."""

    def guess(self, member: int) -> int | None:
        """Return what the member samples with the noise of the position."""
        return int(self.parts[member].symbol)

    def receive(self, member: int, logits: LogitsRow) -> None:
        """Sample from a member's logits."""
        self._take(member, self._samplers[member](logits))

    def run(self, member: int) -> RequestFlow[None]:
        """Sample from a member, which its engine may do on the device, or from what the router has observed of it."""
        self.read(member)
        if (row := self.step.observed_row(member)) is not None:
            return self.receive(member, row)
        request, sample = self.request(member), self._samplers[member]
        [response] = yield [SampleRequest(member, request.ids, sample, request.top_k_filter, allowed=request.allowed)]
        self._take(member, response)

    def _take(self, member: int, sample: SampleResponse) -> None:
        self.parts[member] = sample
        if member in self.members:
            self.choice = Choice(sample.symbol, member, sample.logprob, sample.top_logprobs)
