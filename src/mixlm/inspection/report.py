"""The results of an inspection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mixlm.engines.requests import Forward


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One member, as far as it is known without running it.

    Attributes:
        rows: Size of the output layer, including padding.
        pieces: Number of distinct byte strings among its tokens.
        control: Number of control tokens.
        ends: The ids that end a completion, by name.
        reading: What the engine reports about its tokenizer.
        details: What the engine reports about itself.
        prompt: The prompt for the question, with its control tokens spelled out.
        prompt_tokens: The number of tokens in the prompt.
        weights_bytes: Memory of this member's weights.
        shares: The first member that shares its weights, if any.
    """

    name: str
    weight: float
    rows: int
    pieces: int
    control: int
    ends: Mapping[str, int]
    reading: Mapping[str, str]
    details: Mapping[str, str]
    prompt: str
    prompt_tokens: int
    stops: tuple[str, ...]
    context_length: int
    weights_bytes: int
    shares: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Feasibility:
    """Whether a unit or a method is possible for the ensemble, and if not, the reason."""

    kind: str
    name: str
    possible: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PairReport:
    """How far two members agree. What is measured on a sample text is None if no model was run.

    Attributes:
        members: The names of the two.
        common: Number of byte strings that are tokens of both.
        share: `common` as a fraction of each member's pieces.
        mass: Each member's probability of pieces that the other has too, including end of text; mean over positions.
        distance: Total variation between the two next-token distributions over shared symbols; mean over `places`.
        places: Number of positions in the text where both members have a token boundary.
    """

    members: tuple[str, str]
    common: int
    share: tuple[float, float]
    mass: tuple[float, float] | None = None
    distance: float | None = None
    places: int = 0


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """Median seconds of a member's forward pass, by its number of tokens, after `cached` tokens."""

    member: str
    cached: int
    seconds: Mapping[int, float]

    @classmethod
    def of(cls, member: str, forwards: Sequence[Forward]) -> ForwardCost:
        """Return the medians of a member's timed forwards."""
        lengths = sorted({forward.tokens for forward in forwards})
        seconds = {n: median(forward.seconds for forward in forwards if forward.tokens == n) for n in lengths}
        return cls(member, forwards[0].cached, seconds)


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Tokens per second of a method: predicted from forward passes alone, and measured if there was a run."""

    method: str
    members: tuple[str, ...]
    predicted: float
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What a combination rule needs, and what it costs on a sample.

    Attributes:
        name: The rule.
        parameters: Its parameters that are given.
        roles: The member of each role.
        needs: What it asks of the members.
        bounds: How a position is decided before all members have run.
        tokens: Length of the sample in tokens; 0 if no model was run.
        stopped: The share of the other members' forwards that was not needed, without drafts.
        forwards: Forwards of members for each token by `layered`, with its drafts.
        drafted: Drafts that were verified.
        accepted: Those of them that were accepted.
        tokens_per_second: Of `layered`.
        conventional_tokens_per_second: Of `conventional`.
    """

    name: str
    parameters: Mapping[str, Any]
    roles: Mapping[str, str]
    needs: tuple[str, ...]
    bounds: str
    tokens: int = 0
    stopped: float = 0.0
    forwards: float = 0.0
    drafted: int = 0
    accepted: int = 0
    tokens_per_second: float = 0.0
    conventional_tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The report of an inspection.

    Attributes:
        text_bytes: Size of the sample text that the members scored; 0 if no model was run.
        unmeasured: Why nothing was measured, if so.
        rule: The combination rule; None for the average.
        router_inputs: What the router looks at beside the text, and which engines can run it; None for the text alone.
    """

    unit: str
    router: str
    question: str
    members: tuple[MemberReport, ...]
    weights_bytes: int
    possibilities: tuple[Feasibility, ...]
    pairs: tuple[PairReport, ...]
    text_bytes: int = 0
    costs: tuple[ForwardCost, ...] = ()
    speeds: tuple[SpeedEstimate, ...] = ()
    unmeasured: str | None = None
    router_inputs: str | None = None
    rule: RuleReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self)
