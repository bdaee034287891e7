"""An ensemble as lm-evaluation-harness sees it.

Every request has noise of its own: the seed is the run's, the sequence is the request's place in the list that the
harness hands over. So a text does not depend on the order of work, nor on what an earlier run had finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from mixlm.engines.base import Session
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, PromptTooLongError
from mixlm.evaluation.contexts import Context, pack, reply_options, unpack
from mixlm.evaluation.likelihood import Likelihood, context_ids, context_text
from mixlm.evaluation.log import AnswerLog
from mixlm.evaluation.readings import as_plain
from mixlm.records import Completion, Message
from mixlm.replies import Prompts
from mixlm.settings import Options

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ConfigError(f"evaluation needs lm-eval: {error}", "pip install 'mixlm[eval]'") from error

Progress = Callable[[str, int, int], None]
_Answer = tuple[Any, dict[str, Any]]


class EnsembleLM(LM):  # type: ignore[misc]
    """Answers the harness's requests with an ensemble.

    options: of every reply, over what a task asks for; a temperature among them samples where a task asks for greedy
    decoding. log: answers to one list of requests that are known already, and where new ones go; without it, every
    list is answered anew. progress: called with `label`, requests answered, requests.
    Raises ConfigError for options that belong to a request, and what `Ensemble` raises.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        options: Options | None = None,
        log: AnswerLog | None = None,
        progress: Progress | None = None,
        label: str = "requests",
    ) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.options = {"method": ensemble.defaults.method, **(options or {})}
        for name in ("sequence", "raw"):
            if name in self.options:
                raise ConfigError(f"{name} is no option of an evaluation: each request has its own")
        self.log = log or AnswerLog()
        self._resumes = log is not None
        self._progress = progress
        self._label = label
        self._likelihood: Likelihood | None = None
        self._sessions: tuple[str, Sequence[Session]] | None = None

    @property
    def tokenizer_name(self) -> str:
        """The members' names: what the harness keys its cache of rendered prompts with."""
        return "mixlm " + " + ".join(self.ensemble.names)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation unrendered: every member renders it with its own template when it is read.

        A last message of the assistant's is the beginning of the answer, whatever `add_generation_prompt` says.
        """
        return pack(chat_history)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write a text for each request, whose arguments are a context and the task's generation options.

        A context that is too long for a member is answered with an empty text, and the log says why. A request for
        greedy decoding is written with the method `greedy` (`single` stays `single`, at temperature 0).
        """
        return cast(list[str], self._answers(requests, self._generate))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return natural log-probability and greediness of each request's continuation behind its context."""
        return [(float(one), bool(greedy)) for one, greedy in self._answers(requests, self._score)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the natural log-probability of each request's text, read as `mixlm.scoring` does, in passages."""
        return [float(one) for one in self._answers(requests, self._roll)]

    def readings(self, requests: Sequence[Any]) -> list[dict[str, Any] | None]:
        """Return what each member thinks of each request's continuation, as `evaluation.readings.as_plain` gives it.

        None for a request that is too long for a member.
        """
        return cast(list[dict[str, Any] | None], self._answers(requests, self._read))

    def _answers(self, requests: Sequence[Any], answer: Callable[[int, tuple[Any, ...]], _Answer]) -> list[Any]:
        """Answer what the log does not know, contexts with a common beginning one after the other."""
        if not self._resumes:
            self.log = AnswerLog()
        arguments = [cast(tuple[Any, ...], one.args) for one in requests]
        pending = [at for at, one in enumerate(arguments) if not self.log.knows(at, one)]
        known = len(requests) - len(pending)
        for done, at in enumerate(sorted(pending, key=lambda at: (str(arguments[at][0]), at))):
            self._show(known + done, len(requests))
            start = time.perf_counter()
            response, about = answer(at, arguments[at])
            about = {"seconds": round(time.perf_counter() - start, 6), **about}
            document = {"doc_id": getattr(requests[at], "doc_id", None), "prompt": _readable(arguments[at])}
            self.log.add(at, arguments[at], {**document, "response": response, **about})
        self._show(len(requests), len(requests))
        return [self.log.response(at) for at in range(len(requests))]

    def _show(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._label, done, total)

    def _generate(self, at: int, arguments: tuple[Any, ...]) -> _Answer:
        packed, task = arguments[0], arguments[1]
        options = {**reply_options(task, self.options), "sequence": at}
        try:
            completion = self._write(packed, options)
        except PromptTooLongError as error:
            return "", {"error": error.message}
        usage = completion.usage
        about = {
            "method": options["method"],
            "finish_reason": completion.finish_reason,
            "tokens": usage.tokens,
            "written_by": {name: one.tokens for name, one in usage.members.items()},
            "forwards": {name: one.forwards for name, one in usage.members.items()},
            "seconds": round(usage.seconds, 3),
        }
        return completion.text, about

    def _write(self, packed: str, options: dict[str, Any]) -> Completion:
        context = unpack(packed)
        if context.messages is None:
            options |= {"raw": True, "system": None}
        settings = self.ensemble.settings(**cast(Options, options))
        if context.messages is None:
            prompts = self.ensemble.prompts(context.text, settings)
        else:
            messages = _with_system(context.messages, settings.system)
            prompts = self.ensemble.prompts(
                messages, self.ensemble.settings(**cast(Options, options | {"system": None}))
            )
            if context.text:
                prompts = self._begun(Context(context.text, messages))
        # A cache is shared by equal prompts only: a forward's rounding depends on what was cached before, and a text
        # should not depend on the requests before it.
        if self._sessions is None or self._sessions[0] != packed:
            self._sessions = packed, [one.engine.session() for one in self.ensemble.members]
        completion = self.ensemble.writer(settings, self._sessions[1]).stream(prompts).finish()
        for session in self._sessions[1]:
            session.work.log.clear()
        return completion

    def _begun(self, context: Context) -> Prompts:
        """Return prompts with the beginning of the answer behind them. Raises PromptTooLongError."""
        ids = tuple(context_ids(one.engine, context) for one in self.ensemble.members)
        for one, mine in zip(self.ensemble.members, ids, strict=True):
            if len(mine) >= one.engine.context_length:
                raise PromptTooLongError(
                    f"the prompt has {len(mine)} tokens for {one.name}, whose context holds {one.engine.context_length}"
                )
        return Prompts(ids, context_text(context))

    def _score(self, at: int, arguments: tuple[Any, ...]) -> _Answer:
        about = {"continuation": arguments[1]}
        try:
            return list(self._scorer().continuation(self._context(arguments), arguments[1])), about
        except PromptTooLongError as error:
            return [-math.inf, False], {**about, "error": error.message}

    def _read(self, at: int, arguments: tuple[Any, ...]) -> _Answer:
        about = {"continuation": arguments[1]}
        start = time.perf_counter()
        try:
            found = as_plain(self._scorer().read(self._context(arguments), arguments[1]))
        except PromptTooLongError as error:
            return None, {**about, "error": error.message}
        return found and {**found, "seconds": time.perf_counter() - start}, about

    def _context(self, arguments: tuple[Any, ...]) -> Context:
        """Return the context of a request, with the system text in front of its messages."""
        context = unpack(arguments[0])
        if context.messages is None:
            return context
        return Context(context.text, _with_system(context.messages, self._system()))

    def _roll(self, at: int, arguments: tuple[Any, ...]) -> _Answer:
        return self._scorer().text(arguments[0]), {}

    def _scorer(self) -> Likelihood:
        if self._likelihood is None:
            self._likelihood = Likelihood(self.ensemble, alone=self.options["method"] == "single")
        return self._likelihood

    def _system(self) -> str | None:
        return cast(str | None, self.options.get("system", self.ensemble.defaults.system))


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Put a system text in front, joined with the task's own: templates know one system message."""
    if system is None:
        return messages
    if messages and messages[0].role == "system":
        return (Message("system", f"{system}\n\n{messages[0].content}"), *messages[1:])
    return (Message("system", system), *messages)


def _readable(arguments: tuple[Any, ...]) -> Any:
    return unpack(arguments[0]).readable()
