"""How one reply is to be written: the options of a call, checked before anything runs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from mixlm.config import LOGPROBS_OF, METHODS, ON_FAILURE, RULES, LogprobsOf, Method, OnFailure, Rule
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.types import Sampling

# Greedy decoding asks for the most likely symbol of the plain average unless told otherwise.
_PLAIN = Sampling(temperature=1.0, top_k=0)
_SAMPLING = tuple(one.name for one in fields(Sampling))
# What the papers set where an option is not given; temperature 0 is each rule's own choice of the most likely.
_PUBLISHED: Mapping[Rule, Mapping[str, Any]] = {"gac": {}, "unite": {"top_k": 10}}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Options(TypedDict, total=False):
    """Options of `Ensemble.generate`, `stream` and `chat`; see `GenerationOptions` and `Sampling`."""

    method: Method
    max_tokens: int
    stop: str | Sequence[str] | None
    seed: int
    sequence: int
    raw: bool
    system: str | None
    mix_then_truncate: bool
    rule: Rule | None
    ignore_end: bool
    draft: str | None
    block: int
    on_failure: OnFailure
    top_logprobs: int
    logprobs_of: LogprobsOf
    logit_bias: Mapping[str | int, float]
    json_schema: Mapping[str, Any] | None
    score_prompt: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The checked options of one reply.

    max_tokens: symbols written at most. stop: strings that end the reply and are not part of it. seed and sequence: the
    key of the noise; equal keys give equal text. raw: continue the prompt as it stands, without template. system: a
    system message in front. mix_then_truncate: `conventional` only, truncates and tempers the average in place of each
    member. rule: `conventional` only, a published way to average in place of the library's own (`decoding/gac`,
    `decoding/unite`), for comparison. ignore_end: never draw end-of-text, for measuring. draft: what writes ahead in
    `speculative` and `greedy`: a member's name, or "lookup". block: guessed positions that are checked at once.
    on_failure: where a member stops answering, "error" ends the reply and "drop" gives its weight to the others.
    alternatives: how many of the likeliest symbols each token tells beside itself. logprobs_of: "member" for
    log-probabilities under the law that a token was drawn from, "ensemble" for those of the average, which takes a
    forward of every member for each symbol. logit_bias: added to the logits of each member's tokens that have exactly a
    text's bytes, in front of all other options; by ids where members share a vocabulary.
    json_schema: the reply is JSON of this schema, if it ends before max_tokens (`core/grammar`).
    score_prompt: the log-probabilities of a raw prompt are told too, under the members as they are; max_tokens may then
    be 0. sampling: options given for every member, by name.
    """

    method: Method = "mixture"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    sequence: int = 0
    raw: bool = False
    system: str | None = None
    mix_then_truncate: bool = False
    rule: Rule | None = None
    ignore_end: bool = False
    draft: str | None = None
    block: int = 4
    on_failure: OnFailure = "error"
    top_logprobs: int = 0
    logprobs_of: LogprobsOf = "member"
    logit_bias: Mapping[str | int, float] = field(default_factory=dict)
    json_schema: Mapping[str, Any] | None = None
    score_prompt: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            hint = did_you_mean(str(self.method), METHODS)
            raise ConfigError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}", hint)
        if self.on_failure not in ON_FAILURE:
            raise ConfigError(f"on_failure is {self.on_failure!r}; it must be one of {', '.join(ON_FAILURE)}")
        if self.logprobs_of not in LOGPROBS_OF:
            raise ConfigError(f"logprobs_of is {self.logprobs_of!r}; it must be one of {', '.join(LOGPROBS_OF)}")
        if self.score_prompt and not self.raw:
            raise UnsupportedError("score_prompt tells of a raw prompt, and this one is in a template", "use raw=True")
        whole = (
            ("max_tokens", 0 if self.score_prompt else 1),
            ("seed", 0),
            ("sequence", 0),
            ("block", 1),
            ("top_logprobs", 0),
        )
        for name, least in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**64:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        self._check_bias()
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise ConfigError(f"json_schema is {self.json_schema!r}; it must be an object of JSON")
        if self.json_schema is not None and self.ignore_end:
            raise UnsupportedError("json_schema says where a reply ends, and ignore_end goes on", "leave one out")
        if self.draft is not None and self.method not in ("speculative", "greedy"):
            raise ConfigError(
                f"draft is {self.draft!r}, and {self.method} writes nothing ahead",
                "use --method speculative with it, or greedy",
            )
        if self.mix_then_truncate and self.method != "conventional":
            raise UnsupportedError(
                f"mix-then-truncate has no exact form in {self.method}: its law needs every member's distribution",
                "use --method conventional with it",
            )
        if self.rule is not None:
            self._check_rule(self.rule)

    def _check_bias(self) -> None:
        for key, value in self.logit_bias.items():
            named = isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool) and key >= 0)
            if not named or key == "":
                raise ConfigError(f"logit_bias has the key {key!r}; it must be a token's text, or its id")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise ConfigError(f"logit_bias is {value!r} for {key!r}; it must be a number from -100 to 100")

    def _check_rule(self, rule: Rule) -> None:
        if rule not in RULES:
            hint = did_you_mean(str(rule), RULES)
            raise ConfigError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}", hint)
        if self.method != "conventional":
            raise UnsupportedError(
                f"rule {rule} has no form in {self.method}: its law needs every member's distribution",
                "use --method conventional with it",
            )
        if self.mix_then_truncate:
            raise UnsupportedError(
                f"rule {rule} and mix-then-truncate are both given",
                "leave one out: rules truncate as they are published",
            )

    def with_options(self, options: Mapping[str, Any]) -> GenerationOptions:
        """Return these settings with a call's options over them. Raises ConfigError for an unknown one."""
        sampling = {name: value for name, value in options.items() if name in _SAMPLING}
        others = {name: value for name, value in options.items() if name not in _SAMPLING}
        known = [one.name for one in fields(self) if one.name != "sampling"]
        for name in others:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}", did_you_mean(name, [*known, *_SAMPLING]))
        if "stop" in others:
            stop = others["stop"]
            others["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        others.setdefault("seed", secrets.randbits(32))
        return replace(self, **others, sampling={**self.sampling, **sampling})

    def with_turn(self, turn: int) -> GenerationOptions:
        """Return these settings for another turn of a conversation: the same seed, noise of its own."""
        return replace(self, sequence=self.sequence + turn)

    def member_sampling(self, own: Mapping[str, Any]) -> Sampling:
        """Return one member's sampling: the call's options over the member's own over the defaults.

        Raises UnsupportedError for temperature 0 where a symbol is drawn from an average.
        """
        given = {**own, **self.sampling}
        if self.mix_then_truncate or self.rule is not None:
            return replace(_PLAIN, **{name: given[name] for name in _PENALTIES if name in given})
        chosen = Sampling(**given)
        if self.is_greedy(own):
            if chosen.temperature == 0:
                given["temperature"] = 1.0
            return replace(_PLAIN, **given)
        if chosen.temperature == 0:
            raise UnsupportedError(
                f"temperature is 0, and {self.method} draws by chance: the most likely token of a member drawn by "
                "chance is not the most likely token of the average",
                "use --method greedy",
            )
        return chosen

    @property
    def wants_ensemble_logprobs(self) -> bool:
        """Whether every member is asked for its part of the average, beside what the method itself asks."""
        return self.logprobs_of == "ensemble" and self.method != "conventional"

    def is_greedy(self, own: Mapping[str, Any]) -> bool:
        """Whether the reply is the most likely one at each step: `greedy`, or `single` at temperature 0."""
        return self.method == "greedy" or (self.method == "single" and {**own, **self.sampling}.get("temperature") == 0)

    def mixed_sampling(self, own: Mapping[str, Any]) -> Sampling | None:
        """Return what is applied to the average itself, if anything is."""
        if not self.mix_then_truncate and self.rule is None:
            return None
        given = {name: value for name, value in {**own, **self.sampling}.items() if name not in _PENALTIES}
        if self.rule is not None:
            chosen = Sampling(**{**_PUBLISHED[self.rule], **given})
            if self.rule == "unite" and chosen.top_k == 0:
                raise ConfigError(
                    "top_k is 0, and rule unite joins each member's top k", "give --top-k 10, as published"
                )
            return chosen
        chosen = Sampling(**given)
        if chosen.temperature == 0:
            raise UnsupportedError("temperature is 0, and conventional draws by chance", "use --method greedy")
        return chosen
