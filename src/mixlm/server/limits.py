"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mixlm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The limits of a server. Times are in seconds.

    Attributes:
        max_batch: Generations that run at the same time.
        max_queue: Generations that may wait in addition.
        prefill_chunk: Most tokens of prompts that one step of a model runs; fewer where they take long.
        request_timeout: From the arrival of a request to the end of its response.
        grace_period: For generations to finish once the server is told to stop.
        max_body_bytes: Size of a request body.
        max_prompt_chars: Characters of one prompt, or of one conversation.
        body_timeout: For a request body to arrive.
        max_schema_chars: Characters of a JSON schema, as a grammar.
        schema_timeout: For a JSON schema to compile.
        encode_timeout: For the prompts of a request to be tokenized.
        stall_timeout: For a step of the models, before the server reports itself as stalled.
        max_stored_bytes: Of responses of /v1/responses that can be continued, with their conversations, as JSON.
        send_timeout: For a client to take what was sent to it.
    """

    max_batch: int = 16
    max_queue: int = 64
    prefill_chunk: int = 1024
    request_timeout: float = 300.0
    grace_period: float = 30.0
    max_body_bytes: int = 1 << 20
    max_prompt_chars: int = 200_000
    body_timeout: float = 10.0
    max_schema_chars: int = 100_000
    schema_timeout: float = 2.0
    encode_timeout: float = 10.0
    stall_timeout: float = 120.0
    max_stored_bytes: int = 32 << 20
    send_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, minimum = getattr(self, field.name), 0 if field.name in ("max_queue", "grace_period") else 1e-3
            if not minimum <= value < 2**40:
                bound = "more than 0" if minimum else "0 or more"
                raise ConfigError(f"{field.name} is {value}; it must be {bound}")

    @property
    def capacity(self) -> int:
        """Maximum number of generations, running and waiting."""
        return self.max_batch + self.max_queue
