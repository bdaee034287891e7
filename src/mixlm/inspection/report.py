"""What an inspection says about an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One member, as far as it is known without running it.

    rows: of the output layer, padding included. pieces: distinct byte strings among its tokens. control: how many ids
    only templates may write. ends: the ids that end a reply, by their spelling. reading, details: what the engine says
    of its tokenizer and of itself. prompt: what it reads for the question, control tokens spelled out; prompt_tokens:
    their number. weights_bytes: of this member alone. shares: the first member whose weights it uses too.
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
class Possibility:
    """Whether a unit, a method or a variant of one fits the ensemble; if not, the reason that it is refused with."""

    kind: str
    name: str
    possible: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PairReport:
    """How far two members agree. common: byte strings that tokens of both spell.

    The rest is measured on a sample text, None where nothing was run. mass: the mean over each member's positions of
    the probability that it gives to pieces that the other has too, end-of-text included. distance: the total variation
    between the two next-token distributions over shared symbols, the mean over the places in the text where both have a
    token boundary. places: how many these are.
    """

    members: tuple[str, str]
    common: int
    share: tuple[float, float]
    mass: tuple[float, float] | None = None
    distance: float | None = None
    places: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Measured forwards of a member. seconds: median by the number of tokens run at once behind `cached` others."""

    member: str
    cached: int
    seconds: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of a method. predicted: from forward costs alone. measured: in a short run, if there was one."""

    method: str
    members: tuple[str, ...]
    predicted: float
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The whole report.

    text_bytes: of the sample text that was read; 0 where nothing was run. unmeasured: why that is so.
    """

    unit: str
    router: str
    question: str
    members: tuple[MemberReport, ...]
    weights_bytes: int
    possibilities: tuple[Possibility, ...]
    pairs: tuple[PairReport, ...]
    text_bytes: int = 0
    costs: tuple[Cost, ...] = ()
    speeds: tuple[Speed, ...] = ()
    unmeasured: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self)
