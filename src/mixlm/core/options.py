"""The options of a generation, checked before anything runs."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from mixlm.choices import (
    CONTRASTIVE_FORMS,
    DEFER_BY,
    LOGPROBS_OF,
    METHODS,
    ON_FAILURE,
    RULES,
    LogprobsOf,
    Method,
    OnFailure,
)
from mixlm.core.grammar import MAX_CALLS, TOOL_CHOICES, Language, check_tool_choice, checked_tools
from mixlm.core.rule_options import (
    AVERAGE_METHODS,
    PUBLISHED_GREEDY,
    RULE_PARAMETERS,
    AnyRule,
    build_rule,
    check_rule,
    check_rule_method,
    is_average,
    rule_name,
)
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.option_spec import OptionSpec, check_options, ensemble_option, generation_option, option, specs
from mixlm.types import PLAIN_SAMPLING, Sampling, Tool

if TYPE_CHECKING:
    from mixlm.core.combinations import Combination

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_RENAMED = {"alternatives": "top_logprobs"}
# What generations do not have, and who has it.
_ELSEWHERE = {
    **{
        name: f"it belongs to the ensemble: ensemble.with_{name}(…)"
        for name in ("weights", "router", "unit", "logits_processors")
    },
    **{name: f"it belongs to loading: mixlm.load(…, {name}=…)" for name in ("engine", "dtype", "device")},
}


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
    rule: AnyRule | None
    strength: float | None
    alpha: float | None
    form: str | None
    by: str | None
    ignore_end: bool
    draft: str | None
    block: int
    on_failure: OnFailure
    top_logprobs: int
    logprobs_of: LogprobsOf
    logit_bias: Mapping[str | int, float]
    json_schema: Mapping[str, Any] | None
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    min_tokens: int
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

    With `Sampling`, these fields are the table of options. The checks, the options of the command line, the `mixlm`
    object of the HTTP API and `[sampling]` in ensemble files are built from it. `Options`, the HTTP fields of OpenAI's
    API and the other keys of ensemble files are written by hand.

    Attributes:
        method: The decoding method.
        mix_then_truncate: Another name of the rule "mean-then-truncate".
        rule: How the members' distributions are combined (`core/combinations`): a rule's name; or a `Combination`; or a
            function from probabilities, float64 (members, symbols), and weights, float64 (members,), to a distribution,
            float64 (symbols,). None is the average.
        strength: How much the rules "geometric", "power", "contrastive", "proxy", "guidance" and "defer" change; None
            is the rule's default, here and in the next three.
        alpha: For "contrastive": tokens of at least this share of the likeliest one's probability are plausible.
        form: For "contrastive": which published formula, "weighted" or "original".
        by: For "defer": what is compared with the strength, "top", "entropy" or "token".
        max_tokens: Most symbols to generate.
        stop: Strings that end the completion and are not part of it.
        seed: First part of the key of the random numbers; equal keys give equal text.
        sequence: Second part of that key: the number of the sequence.
        draft: What drafts in `speculative`, `layered` and `greedy`: a member's name, "lookup", or "none".
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
        tools: Functions that the completion may call: `Tool`, or dicts as in OpenAI's API.
        tool_choice: "auto" for text or calls, "required" for calls, "none" for text, or the one function to call.
        parallel_tool_calls: Whether a completion may have several calls.
        chat_template_kwargs: Further variables of the members' chat templates; each gets those that it names.
        add_generation_prompt: Whether the prompt ends where a response begins, and not after the last message.
        continue_final_message: Continue the last message, which is left open.
        min_tokens: Symbols before end-of-text or a stop string may end the completion.
        score_prompt: Also return the log-probabilities of a raw prompt, under the untransformed members and the rule;
            `max_tokens` may then be 0.

    `sampling` has the options of `Sampling` that are given for every member, by name.
    """

    method: Method = ensemble_option("mixture", "the decoding method", choices=METHODS)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    mix_then_truncate: bool = option(
        False, "Another name of --rule mean-then-truncate.", panel="Sampling", http="mixlm"
    )
    rule: AnyRule | None = ensemble_option(
        None, "how the members' distributions are combined", default_text="average", choices=RULES
    )
    strength: float | None = ensemble_option(
        None,
        "How much the rules geometric, power, contrastive, proxy, guidance and defer change.",
        default_text="that of the rule",
        metavar="X",
        minimum=-1e6,
        maximum=1e6,
    )
    alpha: float | None = ensemble_option(
        None,
        "For contrastive: tokens of at least this share of the likeliest one's probability are plausible.",
        default_text="0.1",
        metavar="X",
        minimum=0,
        maximum=1,
    )
    form: str | None = ensemble_option(
        None, "for contrastive, which published formula", default_text="weighted", choices=CONTRASTIVE_FORMS
    )
    by: str | None = ensemble_option(
        None, "for defer, what is compared with the strength", default_text="top", choices=DEFER_BY
    )
    max_tokens: int = generation_option(256, "Generate at most N tokens.", http="openai", whole=True, minimum=1)
    stop: tuple[str, ...] = generation_option(
        (), "End the completion before TEXT. Repeatable.", metavar="TEXT", http="openai"
    )
    seed: int = generation_option(
        help="The same seed gives the same text.",
        default_factory=lambda: secrets.randbits(32),
        default_text="random",
        http="openai",
        whole=True,
        minimum=0,
    )
    draft: str | None = generation_option(
        None,
        "What drafts in speculative, layered and greedy: a member's name, lookup, or none.",
        default_text="the cheapest member in speculative, lookup if none is clearly cheaper",
        metavar="NAME",
        http="mixlm",
    )
    block: int = generation_option(4, "Tokens drafted and verified at once.", http="mixlm", whole=True, minimum=1)
    on_failure: OnFailure = generation_option(
        "error", "what to do when a member stops responding", metavar="NAME", choices=ON_FAILURE
    )
    system: str | None = generation_option(None, "A system message.", metavar="TEXT")
    sequence: int = option(0, whole=True, minimum=0)
    raw: bool = option(False)
    ignore_end: bool = option(False)
    top_logprobs: int = option(0, whole=True, minimum=0)
    logprobs_of: LogprobsOf = option(
        "member",
        "log-probabilities of the sampled member's distribution, or of the average or the rule (ensemble, which runs "
        "every member)",
        http="mixlm",
        choices=LOGPROBS_OF,
    )
    logit_bias: Mapping[str | int, float] = option(
        help="Bias by a token's text, digits too.", default_factory=dict, http="mixlm"
    )
    json_schema: Mapping[str, Any] | None = option(None)
    tools: tuple[Tool, ...] = option(())
    tool_choice: str = option("auto")
    parallel_tool_calls: bool = option(True)
    chat_template_kwargs: Mapping[str, Any] = option(default_factory=dict)
    add_generation_prompt: bool = option(True)
    continue_final_message: bool = option(False)
    min_tokens: int = generation_option(0, "Generate at least N tokens.", http="openai", whole=True, minimum=0)
    score_prompt: bool = option(False)

    def __post_init__(self) -> None:
        check_options(self, skip=("rule", *(("max_tokens",) if self.score_prompt and self.max_tokens == 0 else ())))
        if self.score_prompt and not self.raw:
            raise UnsupportedError("score_prompt needs a raw prompt, and this one is in a template", "use raw=True")
        for name in ("system", "draft"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ConfigError(f"{name} is {value!r}; it must be a text, or None")
        self._check_bias()
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise ConfigError(f"json_schema is {self.json_schema!r}; it must be a JSON object")
        check_tool_choice(self.tool_choice, self.tools)
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ConfigError(f"chat_template_kwargs is {self.chat_template_kwargs!r}; it must be a dict")
        self._check_end()
        if self.draft is not None and self.method not in ("speculative", "greedy", "layered"):
            raise ConfigError(
                f"draft is {self.draft!r}, and {self.method} does not draft",
                "use it with --method speculative or greedy",
            )
        self._set_rule()

    def _check_end(self) -> None:
        """Raise UnsupportedError for options that contradict each other on the ends of prompt and completion."""
        if self.language is not None and (self.ignore_end or self.min_tokens):
            name = "ignore_end" if self.ignore_end else "min_tokens"
            raise UnsupportedError(
                f"{self.language.option} decides where a completion ends, and {name} goes on", "leave one out"
            )
        if self.raw and (self.tools or self.continue_final_message or self.chat_template_kwargs):
            name = "tools" if self.tools else "chat_template_kwargs" if self.chat_template_kwargs else ""
            raise UnsupportedError(
                f"{name or 'continue_final_message'} is for chat templates, and the prompt is raw", "leave one out"
            )

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the prompt lists: none if `tool_choice` is "none"."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def language(self) -> Language | None:
        """What the completion is held to; None for nothing."""
        if not self.callable_tools:
            return None if self.json_schema is None else Language(self.json_schema, {})
        named = self.tool_choice not in TOOL_CHOICES
        return Language(
            self.json_schema if self.tool_choice == "auto" else False,
            {tool.name: tool.parameters for tool in self.tools if not named or tool.name == self.tool_choice},
            MAX_CALLS if self.parallel_tool_calls and not named else 1,
        )

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias is {self.logit_bias!r}; it must be a dict of tokens' texts and numbers")
        for key, value in self.logit_bias.items():
            is_id = isinstance(key, int | np.integer) and not isinstance(key, bool)
            is_key = key != "" if isinstance(key, str) else is_id and key >= 0
            if not is_key:
                raise ConfigError(f"logit_bias has the key {key!r}; it must be a token's text, or its id")
            is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            if not (is_number and -100 <= value <= 100):
                raise ConfigError(f"logit_bias is {value!r} for {key!r}; it must be a number from -100 to 100")

    def _set_rule(self) -> None:
        """Check the rule and its parameters; the average is None, and mix_then_truncate is a rule."""
        if self.mix_then_truncate:
            if self.rule not in (None, "mean-then-truncate"):
                raise UnsupportedError(
                    f"rule {rule_name(self.rule)} and mix-then-truncate are both given",
                    "leave one out: mix-then-truncate is the rule mean-then-truncate",
                )
            object.__setattr__(self, "rule", "mean-then-truncate")
            object.__setattr__(self, "mix_then_truncate", False)
        if self.rule is None:
            for name in self.rule_parameters:
                raise ConfigError(f"{name} is given without a rule, and the average has none", "name a rule too")
            return
        check_rule(self.rule)
        build_rule(self.rule, self.rule_parameters)
        if is_average(self.rule):
            object.__setattr__(self, "rule", None)
        else:
            check_rule_method(self.rule, self.method)

    @property
    def rule_parameters(self) -> dict[str, Any]:
        """The parameters of the rule that are given."""
        values = {name: getattr(self, name) for name in RULE_PARAMETERS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def combination(self) -> Combination | None:
        """The rule; None where the method needs none, since it samples the average or a single member."""
        if self.method == "single" or (self.rule is None and self.method != "layered"):
            return None
        return build_rule(self.rule or "average", self.rule_parameters)

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
                raise ConfigError(f"unknown option {name!r}", _ELSEWHERE.get(name) or did_you_mean(name, OPTIONS))
        sampling = {name: values.pop(name) for name in SAMPLING_OPTIONS if name in values}
        if "stop" in values:
            values["stop"] = _stop_strings(values["stop"])
        if "tools" in values:
            values["tools"] = checked_tools(values["tools"] or ())
        values.setdefault("seed", secrets.randbits(32))
        if values.get("mix_then_truncate") and values.get("rule", self.rule) is None:
            values["rule"] = "mean-then-truncate"
        rule: Any = values.get("rule", self.rule)
        if rule is not self.rule and rule != self.rule:
            # The parameters are those of the other rule.
            values = {**dict.fromkeys(RULE_PARAMETERS), **values}
        if values.get("method", self.method) == "single" and "rule" in values and not is_average(rule):
            raise ConfigError(
                f"rule is {rule_name(rule)}, and method single samples one member without a rule", "leave one out"
            )
        if "method" not in values and self.method in AVERAGE_METHODS and not is_average(rule):
            values["method"] = "layered"
        return replace(self, **values, sampling={**self.sampling, **sampling})

    def with_sequence_offset(self, offset: int) -> GenerationOptions:
        """Return these options for another sequence: the same seed, other random numbers."""
        return replace(self, sequence=self.sequence + offset)

    def member_sampling(self, member: Mapping[str, Any]) -> Sampling:
        """Return the sampling of one member: the call's options over the member's own over the defaults.

        Raises:
            UnsupportedError: The temperature is 0, and the method samples.
        """
        options = {**member, **self.sampling}
        if (rule := self.combination) is not None and rule.common_options:
            return replace(PLAIN_SAMPLING, **{name: options[name] for name in _PENALTIES if name in options})
        sampling = Sampling(**options)
        if self.is_greedy(member):
            if sampling.temperature == 0:
                options["temperature"] = 1.0
            # The most likely symbol is that of the untransformed average, unless options are given.
            return replace(PLAIN_SAMPLING, **options)
        if sampling.temperature == 0:
            why = "the most likely token of a random member is not the most likely token of the average"
            about = f"temperature is 0, and {self.method} samples"
            raise UnsupportedError(about if self.rule is not None else f"{about}: {why}", "use --method greedy")
        return sampling

    @property
    def wants_ensemble_logprobs(self) -> bool:
        """Whether log-probabilities need more forwards than the method itself: one of every member per symbol."""
        return self.logprobs_of == "ensemble" and self.method != "conventional"

    def is_greedy(self, member: Mapping[str, Any]) -> bool:
        """Whether each symbol is the most likely one: `greedy`, or `single` at temperature 0."""
        options = {**member, **self.sampling}
        return self.method == "greedy" or (self.method == "single" and options.get("temperature") == 0)

    def combined_sampling(self, member: Mapping[str, Any]) -> Sampling | None:
        """Return the sampling that applies to the combination itself; None if the members have it.

        Raises:
            UnsupportedError: The temperature is 0, and the method samples.
        """
        rule = self.combination
        if rule is None or not rule.common_options:
            return None
        options = {**rule.default_sampling, **member, **self.sampling}
        sampling = Sampling(**{name: value for name, value in options.items() if name not in _PENALTIES})
        if sampling.temperature == 0 and self.method != "greedy" and self.rule not in PUBLISHED_GREEDY:
            raise UnsupportedError(f"temperature is 0, and {self.method} samples", "use --method greedy")
        return sampling


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple | set) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"stop is {stop!r}; it must be a text, or a list of texts")
    if "" in strings:
        raise ConfigError("stop has an empty text, which ends nothing", "leave it out")
    return tuple(strings)


def without_rule(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's options without those of a rule: what applies to a member alone."""
    return {name: value for name, value in options.items() if name not in RULE_OPTIONS}


RULE_OPTIONS = ("rule", "mix_then_truncate", *RULE_PARAMETERS)
SAMPLING_OPTIONS: Mapping[str, OptionSpec] = specs(Sampling)
OPTIONS: Mapping[str, OptionSpec] = {**specs(GenerationOptions), **SAMPLING_OPTIONS}
