"""What a request needs before its generations can be queued: its schema compiled, and its prompts encoded.

Both take time that a client determines. So they run in threads of their own, within limits, and neither on the event
loop nor in the thread of the models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mixlm.generation.generation import Generation
from mixlm.server.api_errors import ApiError
from mixlm.server.fair_threads import FairThreads
from mixlm.server.limits import ServerLimits
from mixlm.server.request_parsing import GenerationTask, ParsedRequest
from mixlm.server.schema_check import check_grammar


async def prepare(
    request: ParsedRequest, client: str, threads: FairThreads, limits: ServerLimits, is_cancelled: Callable[[], bool]
) -> list[Generation]:
    """Return the generations of a request, which have not begun.

    Args:
        request: The request.
        client: Who sent it; clients take turns in the threads.
        threads: Where the work runs.
        limits: How much work there may be.
        is_cancelled: Called in a thread between two prompts; True stops the work.

    Raises:
        ApiError: The prompts take too long to encode.
        MixlmError: The ensemble refuses the schema, a prompt or an option.
    """
    schema = request.tasks[0].settings.json_schema
    if schema is not None:
        check = partial(check_grammar, max_chars=limits.max_schema_chars, timeout=limits.schema_timeout)
        await threads.run(client, partial(request.ensemble.grammars.for_schema, schema, check))
    try:
        encode = partial(_encode, request, is_cancelled)
        return await threads.run(client, encode, timeout=limits.encode_timeout)
    except TimeoutError:
        raise ApiError(
            400,
            f"the prompt takes longer than {limits.encode_timeout:g} s to encode",
            param="messages" if request.kind == "chat" else "prompt",
            code="prompt_too_complex",
        ) from None


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
