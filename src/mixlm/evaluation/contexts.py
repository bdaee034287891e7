"""Requests of the harness in mixlm's terms: conversations, and the options of a generation.

The harness hands a model its prompts as strings, rendered with the model's chat template. The members of an ensemble
have a template each, so a conversation travels through the harness unrendered: `pack` writes it as a mark and JSON, and
`unpack` reads it back where the request arrives. A string without the mark is a text to continue as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlm.engines import Engine
from mixlm.errors import ConfigError, did_you_mean
from mixlm.tokenization.prompt_encoder import PromptForm
from mixlm.types import Ids, Message

# Record separators do not occur in prompts that people write.
_MARK = "\x1emixlm conversation\x1e"
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_KNOWN = (*_LENGTHS, *_SAMPLING, "until", "do_sample", "seed")
_MAX_TOKENS = 256  # the harness's own default


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a request continues: a text, or messages, of which a last one of the assistant's is how its answer begins.

    messages: None for a text, which is then `text`.
    """

    text: str = ""
    messages: tuple[Message, ...] | None = None

    @property
    def form(self) -> PromptForm:
        """How the messages become a prompt."""
        last = self.messages[-1].role if self.messages else None
        return PromptForm(continue_final_message=last == "assistant")

    def readable(self) -> Any:
        """Return the form that is logged: the text, or the messages as the harness has them."""
        if self.messages is None:
            return self.text
        return [{"role": message.role, "content": message.content} for message in self.messages]

    def encoded(self) -> bytes:
        """Return the context as routers see it, UTF-8: its text, or what its messages say."""
        text = self.text if self.messages is None else "\n".join(message.content for message in self.messages)
        return text.encode(errors="replace")

    def ids(self, engine: Engine) -> Ids:
        """Return a member's ids of the context, int64 (n,)."""
        if self.messages is None:
            return engine.prompts.raw(self.text)
        return engine.prompts.chat(self.messages, self.form)

    def with_system(self, system: str | None) -> RequestContext:
        """Return it with a system text in front, joined with the task's own: templates know one system message."""
        if system is None or self.messages is None:
            return self
        own = [message.content for message in self.messages[:1] if message.role == "system"]
        return RequestContext(messages=(Message("system", "\n\n".join([system, *own])), *self.messages[len(own) :]))


def pack(history: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation of the harness as a string that `unpack` reads."""
    return _MARK + json.dumps([[message["role"], message["content"]] for message in history])


def unpack(context: str) -> RequestContext:
    """Read the context of a request. Raises ConfigError for a role that mixlm does not know."""
    if not context.startswith(_MARK):
        return RequestContext(context)
    turns = json.loads(context.removeprefix(_MARK))
    roles = ("system", "user", "assistant")
    for role, _ in turns:
        if role not in roles:
            raise ConfigError(f"a message of the task has the role {role!r}; it must be one of {', '.join(roles)}")
    return RequestContext(messages=tuple(Message(role, content) for role, content in turns))


def is_greedy(task: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether a request asks for the most likely text, as the harness reads its options.

    It does with temperature 0, with `do_sample: false`, and without either; a temperature of the user's overrules it.
    """
    if "temperature" in overrides:
        return overrides.get("method") == "greedy"
    temperature, sample = task.get("temperature"), task.get("do_sample")
    return overrides.get("method") == "greedy" or sample is False or temperature == 0 or (sample or temperature) is None


def generation_options(task: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a completion: those of the task (its `generation_kwargs`), under those that the user gave.

    A greedy request is written with the method `greedy`; `single` stays, at temperature 0. Raises ConfigError for an
    option of the task that mixlm has no counterpart for: dropping it would measure something else.
    """
    if task.get("num_beams", 1) != 1:
        raise ConfigError(f"the task asks for num_beams {task['num_beams']}; mixlm has no beam search")
    for name in task:
        if name not in (*_KNOWN, "num_beams"):
            raise ConfigError(f"the task has the generation option {name!r}, which mixlm has not", _hint(name))
    greedy = is_greedy(task, overrides)
    sampling = () if greedy else _SAMPLING
    options: dict[str, Any] = {name: task[name] for name in sampling if task.get(name) is not None}
    if options.get("top_k", 0) < 0:
        options["top_k"] = 0  # elsewhere -1 is off
    lengths = [task[name] for name in _LENGTHS if task.get(name) is not None]
    options |= {
        "max_tokens": int(lengths[0]) if lengths else _MAX_TOKENS,
        "seed": int(task.get("seed") or 0),
        **overrides,
    }
    if greedy and overrides.get("method") == "single":
        options["temperature"] = 0.0
    elif greedy:
        options["method"] = "greedy"
    options["stop"] = tuple(dict.fromkeys([*_strings(task.get("until")), *_strings(overrides.get("stop"))]))
    return options


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value or []
    return [value for value in values if value]


def _hint(name: str) -> str:
    return did_you_mean(name, _KNOWN) or f"known are {', '.join(_KNOWN)}"
