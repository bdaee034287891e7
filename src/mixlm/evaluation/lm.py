"""An ensemble as lm-evaluation-harness sees it.

Every request has noise of its own: the seed is the run's, the sequence is the request's place in the list that the
harness hands over. So a text does not depend on the order of work, nor on what an earlier run had finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import starmap
from typing import Any, cast

from mixlm.core.options import Options
from mixlm.ensemble import AT_ONCE, Ensemble
from mixlm.errors import ConfigError, PromptTooLongError
from mixlm.evaluation.contexts import RequestContext, generation_options, pack, unpack
from mixlm.evaluation.likelihood import ContinuationScorer, RuleContinuationScorer, rule_settings
from mixlm.evaluation.request_scores import scores_to_json
from mixlm.evaluation.run_folder import request_key, response_log
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.resumable_log import ResumableLog
from mixlm.terminal import Progress

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ConfigError(f"evaluation needs lm-eval: {error}", "pip install 'mixlm[eval]'") from error

_Answer = tuple[Any, dict[str, Any]]
_Pending = Sequence[tuple[int, tuple[Any, ...]]]
_Answers = Callable[[_Pending], Iterator[tuple[int, _Answer]]]


class EnsembleLM(LM):  # type: ignore[misc]
    """The harness's interface to an ensemble.

    Args:
        ensemble: The ensemble.
        options: Generation options of every completion, over the task's. A temperature among them samples where a task
            asks for greedy decoding.
        log: Known responses to one list of requests, and where new ones go. Without it, every list gets new responses.
        progress: Called with `label`, the number of finished requests, and of all requests.
        label: What progress is called with.
        at_once: Completions generated together. In float32 it does not change them; in bfloat16 a batched forward
            rounds differently, which may tip a close sample.

    Raises:
        ConfigError: An option belongs to a request.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        options: Options | None = None,
        log: ResumableLog | None = None,
        progress: Progress | None = None,
        label: str = "requests",
        at_once: int = AT_ONCE,
    ) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.options = {"method": ensemble.defaults.method, **(options or {})}
        for name in ("sequence", "raw"):
            if name in self.options:
                raise ConfigError(f"{name} is no option of an evaluation: each request has its own")
        self.log = log or response_log()
        self._resumes = log is not None
        self._progress = progress
        self._label = label
        self._at_once = at_once

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
        return cast(list[str], self._respond(requests, self._generate))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return natural log-probability and greediness of each request's continuation after its context."""
        return [(float(logprob), bool(greedy)) for logprob, greedy in self._respond(requests, _one_by_one(self._score))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the natural log-probability of each request's text, read as `scoring/score` does, in passages."""
        return [float(logprob) for logprob in self._respond(requests, _one_by_one(self._score_text))]

    def member_scores(self, requests: Sequence[Any]) -> list[dict[str, Any] | None]:
        """Return what each member thinks of each request's continuation, as `evaluation.request_scores` gives it.

        None for a request that is too long for a member.
        """
        return cast(list[dict[str, Any] | None], self._respond(requests, _one_by_one(self._score_members)))

    def _respond(self, requests: Sequence[Any], answers: _Answers) -> list[Any]:
        """Answer what the log does not know, contexts with a common beginning one after the other."""
        if not self._resumes:
            self.log = response_log()
        arguments = [cast(tuple[Any, ...], request.args) for request in requests]
        pending = [i for i, argument in enumerate(arguments) if self.log.get(i, request_key(argument)) is None]
        known = len(requests) - len(pending)
        pending.sort(key=lambda i: (str(arguments[i][0]), i))
        self._show(known, len(requests))
        for done, (i, (response, about)) in enumerate(answers([(i, arguments[i]) for i in pending]), start=1):
            self._show(known + done, len(requests))
            document = {"doc_id": getattr(requests[i], "doc_id", None), "prompt": unpack(arguments[i][0]).readable()}
            self.log.add(i, request_key(arguments[i]), {**document, "response": response, **about})
        return [self.log.records[i]["response"] for i in range(len(requests))]

    def _show(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._label, done, total)

    def _generate(self, pending: _Pending) -> Iterator[tuple[int, _Answer]]:
        """Write completions, `at_once` at a time, and give each when it is finished."""

        def begin(index: int, arguments: tuple[Any, ...]) -> tuple[tuple[int, str], Generation]:
            options = {**generation_options(arguments[1], self.options), "sequence": index}
            return (index, options["method"]), self._stream(arguments[0], options)

        since = time.perf_counter()
        for (index, method), stream in Scheduler(self._at_once).run_each(starmap(begin, pending)):
            response, about = _log_entry(stream, method)
            # Since the last one was finished: completions overlap, and their own times would not add up.
            now = time.perf_counter()
            yield index, (response, {**about, "seconds": round(now - since, 6)})
            since = now

    def _stream(self, packed: str, options: dict[str, Any]) -> Generation:
        """Begin a completion to a packed context; one that is too long is refused."""
        context = unpack(packed)
        options |= {"continue_final_message": context.form.continue_final_message}
        if context.messages is None:
            options |= {"raw": True, "system": None}
        settings = self.ensemble.settings(**cast(Options, options))
        context = context.with_system(settings.system)
        prompt = context.text if context.messages is None else context.messages
        started = self.ensemble.context(settings)
        try:
            return started.start(self.ensemble.encode_prompt(prompt, replace(settings, system=None)))
        except PromptTooLongError as error:
            return started.refused(error)

    def _score(self, index: int, arguments: tuple[Any, ...]) -> _Answer:
        about = {"continuation": arguments[1]}
        try:
            return list(self.scorer.continuation(self._context(arguments), arguments[1])), about
        except PromptTooLongError as error:
            return [-math.inf, False], {**about, "error": error.message}

    def _score_members(self, index: int, arguments: tuple[Any, ...]) -> _Answer:
        about = {"continuation": arguments[1]}
        try:
            scores = self._average_scorer.member_scores(self._context(arguments), arguments[1])
        except PromptTooLongError as error:
            return None, {**about, "error": error.message}
        return scores_to_json(scores), about

    def _context(self, arguments: tuple[Any, ...]) -> RequestContext:
        """Return the context of a request, with the system text in front of its messages."""
        system = cast(str | None, self.options.get("system", self.ensemble.defaults.system))
        return unpack(arguments[0]).with_system(system)

    def _score_text(self, index: int, arguments: tuple[Any, ...]) -> _Answer:
        return self.scorer.text(arguments[0]), {}

    @cached_property
    def scorer(self) -> ContinuationScorer | RuleContinuationScorer:
        """What scores given texts. Raises UnsupportedError where the rule or an engine gives no log-probabilities."""
        if self.options["method"] != "single":
            settings = rule_settings(self.ensemble, self.options)
            if settings.rule is not None:
                return RuleContinuationScorer(self.ensemble, settings)
        return self._average_scorer

    @cached_property
    def _average_scorer(self) -> ContinuationScorer:
        return ContinuationScorer(self.ensemble, alone=self.options["method"] == "single")


def _one_by_one(answer: Callable[[int, tuple[Any, ...]], _Answer]) -> _Answers:
    """Return what answers one request after the other, and notes how long each took."""

    def answers(pending: _Pending) -> Iterator[tuple[int, _Answer]]:
        for index, arguments in pending:
            start = time.perf_counter()
            response, about = answer(index, arguments)
            yield index, (response, {"seconds": round(time.perf_counter() - start, 6), **about})

    return answers


def _log_entry(stream: Generation, method: str) -> _Answer:
    """Return a finished completion's text, and what the log says of it. Raises what ended it early, if it began."""
    if isinstance(stream.error, PromptTooLongError):
        return "", {"error": stream.error.message}
    if stream.error is not None:
        raise stream.error
    completion = stream.completion
    usage = completion.usage
    return completion.text, {
        "method": method,
        "finish_reason": completion.finish_reason,
        "tokens": usage.tokens,
        "written_by": {name: member.tokens for name, member in usage.members.items()},
        "forwards": {name: member.forwards for name, member in usage.members.items()},
    }
