"""The options of a generation, checked before anything runs."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from mixlm.choices import LOGPROBS_OF, METHODS, ON_FAILURE, RULES, LogprobsOf, Method, OnFailure, Rule
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.option_spec import OptionSpec, check_options, option, specs
from mixlm.types import Sampling

# Greedy decoding takes the most likely symbol of the untransformed average unless options are given.
_PLAIN = Sampling(temperature=1.0, top_k=0)
# What the papers use where an option is not given; temperature 0 is each rule's own choice of the most likely.
_PUBLISHED: Mapping[Rule, Mapping[str, Any]] = {"gac": {}, "unite": {"top_k": 10}}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_RENAMED = {"alternatives": "top_logprobs"}


class Options(TypedDict, total=False):
    """The keywords of `Ensemble.generate`, `stream` and `chat`: the fields of `GenerationOptions` and `Sampling`."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """The checked options of one generation.

    With `Sampling`, these fields are the table of options: the command line, the ensemble file, the HTTP API and the
    keywords of `Ensemble.generate` are built from them.

    Attributes:
        method: The decoding method.
        sampling: Options of `Sampling` that are given for every member, by name.
        mix_then_truncate: Apply temperature and truncation to the average, not to each member; `conventional` only.
        rule: A published averaging rule (`decoding/gac`, `decoding/unite`), for comparison; `conventional` only.
        max_tokens: Most symbols to generate.
        stop: Strings that end the completion and are not part of it.
        seed: First part of the key of the random numbers; equal keys give equal text.
        sequence: Second part of that key: the number of the sequence.
        draft: What drafts in `speculative` and `greedy`: a member's name, or "lookup".
        block: Positions that are drafted and verified at once.
        on_failure: What to do when a member stops responding: "error" ends the completion, "drop" gives the member's
            weight to the others.
        system: A system message in front of the prompt.
        raw: Continue the prompt as it is, without a chat template.
        ignore_end: Never sample end-of-text, for measurements.
        top_logprobs: How many of the most likely symbols to return with each token.
        logprobs_of: "member" for log-probabilities in the distribution that a token was sampled from, "ensemble" for
            those in the average, which takes a forward of every member for each symbol.
        logit_bias: What is added to the logits of the tokens with exactly a text's bytes, before all other options; by
            ids where members share a vocabulary.
        json_schema: The completion is JSON of this schema, if it ends before `max_tokens` (`core/grammar`).
        score_prompt: Also return the log-probabilities of a raw prompt, under the untransformed members; `max_tokens`
            may then be 0.
    """

    method: Method = option(
        "mixture", help="the decoding method", panel="Ensemble", metavar="NAME", http="mixlm", choices=METHODS
    )
    sampling: Mapping[str, Any] = field(default_factory=dict)
    mix_then_truncate: bool = option(
        False,
        help="Apply temperature and truncation to the average, not to each member; conventional only.",
        panel="Sampling",
        http="mixlm",
    )
    rule: Rule | None = option(
        None,
        help="a published averaging rule, for comparison; conventional only",
        panel="Sampling",
        metavar="NAME",
        choices=RULES,
    )
    max_tokens: int = option(
        256,
        help="Generate at most N tokens.",
        panel="Generation",
        metavar="N",
        http="openai",
        whole=True,
        minimum=1,
    )
    stop: tuple[str, ...] = option(
        (), help="End the completion before TEXT. Repeatable.", panel="Generation", metavar="TEXT", http="openai"
    )
    seed: int = option(
        default_factory=lambda: secrets.randbits(32),
        help="The same seed gives the same text.",
        default_text="random",
        panel="Generation",
        metavar="N",
        http="openai",
        whole=True,
        minimum=0,
    )
    draft: str | None = option(
        None,
        help="What drafts in speculative and greedy: a member's name, or lookup.",
        default_text="the cheapest member in speculative, lookup if none is clearly cheaper",
        panel="Generation",
        metavar="NAME",
        http="mixlm",
    )
    block: int = option(
        4,
        help="Tokens drafted and verified at once.",
        panel="Generation",
        metavar="N",
        http="mixlm",
        whole=True,
        minimum=1,
    )
    on_failure: OnFailure = option(
        "error",
        help="what to do when a member stops responding",
        panel="Generation",
        metavar="NAME",
        choices=ON_FAILURE,
    )
    system: str | None = option(None, help="A system message.", panel="Generation", metavar="TEXT")
    sequence: int = option(0, whole=True, minimum=0)
    raw: bool = option(False)
    ignore_end: bool = option(False)
    top_logprobs: int = option(0, whole=True, minimum=0)
    logprobs_of: LogprobsOf = option(
        "member",
        help="log-probabilities of the sampled member's distribution or of the average (ensemble, which runs every"
        " member)",
        http="mixlm",
        choices=LOGPROBS_OF,
    )
    logit_bias: Mapping[str | int, float] = option(
        default_factory=dict, help="Bias by a token's text, digits too.", http="mixlm"
    )
    json_schema: Mapping[str, Any] | None = option(None)
    score_prompt: bool = option(False)

    def __post_init__(self) -> None:
        check_options(self, skip=("max_tokens",) if self.score_prompt and self.max_tokens == 0 else ())
        if self.score_prompt and not self.raw:
            raise UnsupportedError("score_prompt needs a raw prompt, and this one is in a template", "use raw=True")
        for name in ("system", "draft"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ConfigError(f"{name} is {value!r}; it must be a text, or None")
        self._check_bias()
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise ConfigError(f"json_schema is {self.json_schema!r}; it must be a JSON object")
        if self.json_schema is not None and self.ignore_end:
            raise UnsupportedError(
                "json_schema decides where a completion ends, and ignore_end goes on", "leave one out"
            )
        if self.draft is not None and self.method not in ("speculative", "greedy"):
            raise ConfigError(
                f"draft is {self.draft!r}, and {self.method} does not draft",
                "use it with --method speculative or greedy",
            )
        if self.mix_then_truncate and self.method != "conventional":
            raise UnsupportedError(
                f"mix-then-truncate has no exact form in {self.method}: it needs every member's distribution",
                "use it with --method conventional",
            )
        if self.rule is not None:
            self._check_rule(self.rule)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias is {self.logit_bias!r}; it must be a dict of tokens' texts and numbers")
        for key, value in self.logit_bias.items():
            is_key = isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool) and key >= 0)
            if not is_key or key == "":
                raise ConfigError(f"logit_bias has the key {key!r}; it must be a token's text, or its id")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise ConfigError(f"logit_bias is {value!r} for {key!r}; it must be a number from -100 to 100")

    def _check_rule(self, rule: Rule) -> None:
        if self.method != "conventional":
            raise UnsupportedError(
                f"rule {rule} has no form in {self.method}: it needs every member's distribution",
                "use it with --method conventional",
            )
        if self.mix_then_truncate:
            raise UnsupportedError(
                f"rule {rule} and mix-then-truncate are both given",
                "leave one out: rules truncate as they are published",
            )

    def with_options(self, options: Mapping[str, Any]) -> GenerationOptions:
        """Return these options with a call's options over them, and a new seed unless one is given.

        Raises:
            ConfigError: An option is unknown, or a value is not allowed.
        """
        values = dict(options)
        for old, new in _RENAMED.items():
            if old in values:
                warnings.warn(f"the option {old!r} is now {new!r}", DeprecationWarning, stacklevel=5)
                values[new] = values.pop(old)
        for name in values:
            if name not in OPTIONS:
                raise ConfigError(f"unknown option {name!r}", did_you_mean(name, OPTIONS))
        sampling = {name: values.pop(name) for name in SAMPLING_OPTIONS if name in values}
        if "stop" in values:
            values["stop"] = _stop_strings(values["stop"])
        values.setdefault("seed", secrets.randbits(32))
        return replace(self, **values, sampling={**self.sampling, **sampling})

    def with_turn(self, turn: int) -> GenerationOptions:
        """Return these options for another turn of a conversation: the same seed, other random numbers."""
        return replace(self, sequence=self.sequence + turn)

    def member_sampling(self, member: Mapping[str, Any]) -> Sampling:
        """Return the sampling of one member: the call's options over the member's over the defaults.

        Args:
            member: The member's own options of `Sampling`.

        Raises:
            UnsupportedError: The temperature is 0, and the method samples.
        """
        options = {**member, **self.sampling}
        if self.mix_then_truncate or self.rule is not None:
            return replace(_PLAIN, **{name: options[name] for name in _PENALTIES if name in options})
        sampling = Sampling(**options)
        if self.is_greedy(member):
            if sampling.temperature == 0:
                options["temperature"] = 1.0
            return replace(_PLAIN, **options)
        if sampling.temperature == 0:
            raise UnsupportedError(
                f"temperature is 0, and {self.method} samples: the most likely token of a random member is not the "
                "most likely token of the average",
                "use --method greedy",
            )
        return sampling

    @property
    def wants_ensemble_logprobs(self) -> bool:
        """Whether log-probabilities need more forwards than the method itself: one of every member per symbol."""
        return self.logprobs_of == "ensemble" and self.method != "conventional"

    def is_greedy(self, member: Mapping[str, Any]) -> bool:
        """Whether each symbol is the most likely one: `greedy`, or `single` at temperature 0."""
        options = {**member, **self.sampling}
        return self.method == "greedy" or (self.method == "single" and options.get("temperature") == 0)

    def mixed_sampling(self, member: Mapping[str, Any]) -> Sampling | None:
        """Return the sampling that is applied to the average itself, None if there is none."""
        if not self.mix_then_truncate and self.rule is None:
            return None
        values = {**member, **self.sampling}
        options = {name: value for name, value in values.items() if name not in _PENALTIES}
        if self.rule is not None:
            sampling = Sampling(**{**_PUBLISHED[self.rule], **options})
            if self.rule == "unite" and sampling.top_k == 0:
                raise ConfigError(
                    "top_k is 0, and rule unite joins each member's top k", "give --top-k 10, as published"
                )
            return sampling
        sampling = Sampling(**options)
        if sampling.temperature == 0:
            raise UnsupportedError("temperature is 0, and conventional samples", "use --method greedy")
        return sampling


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple | set) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"stop is {stop!r}; it must be a text, or a list of texts")
    return tuple(strings)


SAMPLING_OPTIONS: Mapping[str, OptionSpec] = specs(Sampling)
OPTIONS: Mapping[str, OptionSpec] = {**specs(GenerationOptions), **SAMPLING_OPTIONS}
