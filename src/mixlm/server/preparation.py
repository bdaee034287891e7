"""What a request needs before its generations can be queued: its body, its schema compiled, and its prompts encoded.

All take time that a client determines, and so does building a whole response. So they run in threads of their own,
within limits, and neither on the event loop nor in the thread of the models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mixlm.choices import UnitName
from mixlm.core.grammar_check import CompileLimits
from mixlm.errors import MixlmError, PromptTooLongError, TemplateError, TokenizerError
from mixlm.generation.generation import Generation
from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.fair_threads import FairThreads
from mixlm.server.limits import ServerLimits
from mixlm.server.model_registry import ServedModel
from mixlm.server.request_parsing import GenerationTask, ParsedRequest

Result = TypeVar("Result")
_NUM_THREADS = 2
# A body of more bytes may take the event loop longer than others should wait: up to half a second for 1 MiB.
_LARGE_BODY = 1 << 15


class RequestPreparer:
    """Prepares requests; clients take turns. Schemas have threads of their own: prompts do not wait for them.

    Args:
        limits: How much work a request may cause.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._schema_threads = FairThreads(_NUM_THREADS)
        self._prompt_threads = FairThreads(_NUM_THREADS)
        self._body_threads = FairThreads(_NUM_THREADS)

    @property
    def is_busy(self) -> bool:
        """Whether any of the threads runs."""
        return any(threads.is_busy for threads in (self._schema_threads, self._prompt_threads, self._body_threads))

    async def convert(self, size: int, function: Callable[[], Result], client: str) -> Result:
        """Return what a function makes of a request's body, or of a response; large ones take a thread.

        Args:
            size: Of the body, in bytes.
            function: Does it.
            client: Whose body it is.

        Raises:
            ApiError: The body is refused.
        """
        return function() if size < _LARGE_BODY else await self._body_threads.run(client, function)

    async def build_unit(self, model: ServedModel, unit: UnitName | None, client: str) -> None:
        """Build the unit that a request needs, unless it is there. Raises ApiError for one that does not exist."""
        if not model.has_unit(unit):
            await self._schema_threads.run(client, partial(model.with_unit, unit))

    async def prepare(self, request: ParsedRequest, client: str, is_cancelled: Callable[[], bool]) -> list[Generation]:
        """Return the generations of a request, which have not begun.

        Args:
            request: The request.
            client: Who sent it.
            is_cancelled: Called in a thread between two prompts; True stops the work.

        Raises:
            ApiError: The prompts take too long to encode.
            MixlmError: The ensemble refuses the schema, a prompt or an option.
        """
        limits = self._limits
        language = request.tasks[0].settings.language
        if language is not None:
            grammars = request.ensemble.grammars
            check = CompileLimits(
                max_chars=limits.max_schema_chars,
                timeout=limits.schema_timeout,
                num_vocabularies=grammars.num_vocabularies,
            )
            compile_schema = partial(grammars.for_language, language, check)
            try:
                await self._schema_threads.run(client, compile_schema)
            except MixlmError as error:
                raise to_api_error(error).renamed({"response_format": request.schema_field}) from error
        field = "messages" if request.kind == "chat" else "prompt"
        try:
            encode = partial(_encode, request, is_cancelled)
            return await self._prompt_threads.run(client, encode, timeout=limits.encode_timeout)
        except TimeoutError:
            message = f"the prompt takes longer than {limits.encode_timeout:g} s to encode"
            raise ApiError(400, message, param=field, code="prompt_too_complex") from None
        except MixlmError as error:
            refusal = to_api_error(error)
            unread = isinstance(error, (PromptTooLongError, TokenizerError, TemplateError))
            if unread and refusal.status == 400 and refusal.param is None:
                refusal.param = field
            raise refusal from error


def _encode(request: ParsedRequest, is_cancelled: Callable[[], bool]) -> list[Generation]:
    """Encode the prompts of a request. Tasks with the same prompt follow each other; it is encoded once."""
    generations: list[Generation] = []
    previous: GenerationTask | None = None
    for task in request.tasks:
        if is_cancelled():
            break
        if previous is None or task.prompt is not previous.prompt:
            encoded = request.ensemble.encode_prompt(task.prompt, task.settings)
        previous = task
        generations.append(request.ensemble.context(task.settings).start(encoded))
    return generations
