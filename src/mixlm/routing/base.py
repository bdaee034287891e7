"""The interface of routers, and what they may depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from mixlm.errors import ConfigError, UnsupportedError
from mixlm.option_spec import call_function, check_function
from mixlm.types import Floats, HiddenStates, Ids, LogitsRow
from mixlm.units.base import TextView

TOP_K = 20  # most likely tokens of an observed member


@dataclass(frozen=True, slots=True)
class PromptContext:
    """What is known before a generation begins.

    Attributes:
        text: The prompt, without templates, UTF-8.
        bits_per_byte: Runs the prefill of every member and returns the bits per byte of `text` under each, float64
            (members,). Their KV caches hold the prompt afterwards.
    """

    text: bytes
    bits_per_byte: Callable[[], Floats]


@dataclass(frozen=True, slots=True)
class Observes:
    """The one member that a router observes, and what its route gets of it at every state.

    Args:
        member: Its index.
        top_k: How many of its most likely tokens; 0 for none. Every engine reports them.
        hidden: Whether its last hidden state, the input of its output layer; of the engine hf.
        hidden_size: Numbers in that state, where the router takes only one size.

    Raises:
        ConfigError: The member is not one index, or nothing of it is observed.
    """

    member: int
    top_k: int = TOP_K
    hidden: bool = False
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.member, bool) or not isinstance(self.member, int | np.integer) or self.member < 0:
            raise ConfigError(
                f"a router observes the member {self.member!r}; it must be the index of one member",
                "the others run only where their coin falls, and weights must not depend on that",
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ConfigError(f"a router observes {self.top_k!r} likely tokens; it must be a number, 0 or more")
        if not self.top_k and not self.hidden:
            raise ConfigError("a router observes a member, but nothing of it", "set top_k or hidden")


class Observation(NamedTuple):
    """What a route gets of the observed member at a state.

    ids: its most likely tokens, the likeliest first, of equal ones the smaller id, int64 (top_k,); -1 where its engine
    reports no more. logprobs: their log-probabilities without sampling options, renormalised among them so that they
    are the same for every engine, float64 (top_k,); -inf where the id is -1. hidden: float16 (width,), or None.
    """

    ids: Ids
    logprobs: Floats
    hidden: HiddenStates | None = None


class ObservedRow(NamedTuple):
    """The observed member's logits at a state: its own sample there needs no request."""

    member: int
    row: LogitsRow


Route = Callable[[TextView], Floats]
ObservingRoute = Callable[[TextView, Observation], Floats]
RouterFunction = Callable[[bytes, bytes], Sequence[float]]  # prompt and text so far to one weight per member


class Router(Protocol):
    """The weights for a state.

    They may depend on the prompt and the text so far, and on one member that runs at every position: a router with an
    attribute `observes` (`Observes`) names it. If they depended on a member that ran only where its coin fell, or on
    which members ran, the mixture would not sample from the average.
    """

    def begin(self, context: PromptContext) -> Route | ObservingRoute:
        """Return the function from a state to the weights, float64 (members,), non-negative and summing to 1.

        That of a router that observes a member takes an `Observation` as well.
        """
        ...


class FixedRouter:
    """The ensemble's weights, float64 (members,), summing to 1, for every state."""

    def __init__(self, weights: Floats) -> None:
        self.weights = given_weights(weights, self)
        self.members = len(self.weights)

    def begin(self, context: PromptContext) -> Route:
        """Return a route that ignores the state."""
        return lambda state: self.weights


def observed_by(router: Any, members: int | None = None) -> Observes | None:
    """Return what a router observes, None for the text alone.

    Raises:
        ConfigError: It is not `Observes`, or of a member that is not there. members: of the ensemble.
    """
    observes = getattr(router, "observes", None)
    if observes is None:
        return None
    if not isinstance(observes, Observes):
        raise ConfigError(
            f"the router {type(router).__name__} observes {observes!r}; it must be mixlm.routing.Observes",
            "it names one member, which runs at every position",
        )
    if members is not None and observes.member >= members:
        raise ConfigError(
            f"the router {type(router).__name__} observes member {observes.member}, and the ensemble has {members} "
            "of them",
            f"name a member from 0 to {members - 1}",
        )
    return observes


def as_router(router: Any, members: int) -> Router:
    """Return a router, or one of a plain function of the prompt and the text so far, for an ensemble of `members`.

    Raises:
        ConfigError: It is neither, or a router for another number of members.
    """
    if isinstance(router, type) or not hasattr(router, "begin"):
        if isinstance(router, type) or not callable(router):
            raise ConfigError(
                f"router is {router!r}; it must be a router or a function",
                "a function takes the prompt and the text so far, bytes, and returns one weight per member",
            )
        from mixlm.routing.function import FunctionRouter

        router = FunctionRouter(router, members)
    check_function(router.begin, ("context",), f"begin of the router {type(router).__name__}")
    expected = getattr(router, "members", members)
    if expected != members:
        raise ConfigError(f"the router is for {expected} members, and the ensemble has {members} of them")
    observed_by(router, members)
    checked: Router = router
    return checked


class CheckedRoute:
    """A router's function from a state to the weights, which checks the weights each time.

    observes: what it takes beside the state, None for nothing.

    Raises:
        ConfigError: The router fails; or, when called, its weights are not one finite number per member, 0 or more,
            that sum to 1.
    """

    def __init__(self, router: Router, context: PromptContext, members: int) -> None:
        self.observes: Observes | None = observed_by(router, members)
        self._router = router
        self._members = members
        self._route: Any = _call(router, lambda: router.begin(context))
        arguments = ("state",) if self.observes is None else ("state", "observation")
        check_function(self._route, arguments, f"what begin of the router {type(router).__name__} returned")

    def __call__(self, state: TextView, observation: Observation | None = None) -> Floats:
        """Return the weights for a state, float64 (members,). Raises UnsupportedError without what it observes."""
        if self.observes is None:
            weights = _call(self._router, lambda: self._route(state))
        elif observation is None:
            raise UnsupportedError(
                f"the router {type(self._router).__name__} observes a member, which has not run here",
                "use a router of the text, or fixed weights",
            )
        else:
            weights = _call(self._router, lambda: self._route(state, observation))
        return check_weights(weights, self._members, self._router)


def describe_router(router: Router) -> str:
    """Return a router's kind and, where it has numbers of its own, a digest of them; of a function its name."""
    if isinstance(digest := getattr(router, "digest", None), str):
        return f"{type(router).__name__} {digest}"
    values = [value for _, value in sorted(vars(router).items())]
    numbers = [array for array in map(np.asarray, values) if array.dtype.kind in "iuf"]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in numbers)).hexdigest()[:16]
    functions = [getattr(value, "__qualname__", type(value).__qualname__) for value in values if callable(value)]
    return " ".join([type(router).__name__, *functions, *([digest] if numbers else [])])


def given_weights(weights: Any, router: object) -> Floats:
    """Return the weights that a router is built with, float64 (members,). Raises ConfigError where they are none."""
    values = as_numbers(weights)
    if values is None or values.ndim != 1 or not values.size:
        _refuse(router, weights, "they must be numbers, one per member", "has the weights")
    return check_weights(values, values.size, router, "has the weights")


def check_weights(weights: Any, members: int, router: object, verb: str = "returned") -> Floats:
    """Return the weights that a router gave, float64 (members,). Raises ConfigError where they are none."""
    values = as_numbers(weights)
    if values is None or values.shape != (members,):
        _refuse(router, weights, f"it must return {members} numbers, one per member", verb)
    if not (np.isfinite(values).all() and values.min() >= 0):
        _refuse(router, weights, "each weight must be a finite number, 0 or more", verb)
    if abs(values.sum() - 1) > _TOLERANCE:
        _refuse(router, weights, f"weights must sum to 1, and these sum to {values.sum():.6g}", verb)
    return values


def as_numbers(values: Any) -> Floats | None:
    """Return a sequence or an array of numbers as float64; None for anything else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    return array.astype(np.float64, copy=False) if array.dtype.kind in "fiu" else None


_TOLERANCE = 1e-6  # weights may be float32


def _refuse(router: object, weights: Any, rule: str, verb: str) -> NoReturn:
    shown = repr(weights)
    shown = shown if len(shown) <= 100 else f"{shown[:100]} …"
    raise ConfigError(f"the router {type(router).__name__} {verb} {shown}: {rule}")


def _call(router: object, function: Callable[[], Any]) -> Any:
    """Call a user's router. What it raises becomes a ConfigError that names it."""
    return call_function(function, f"the router {type(router).__name__}")
