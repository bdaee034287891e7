"""What a prompt has besides its messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlm.types import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """How a conversation becomes a prompt.

    Attributes:
        tools: The functions that the completion may call.
        variables: Further variables of the chat template, such as `enable_thinking`.
        add_generation_prompt: Whether the prompt ends where a response begins, and not behind the last message.
        continue_final_message: Whether the prompt ends within the last message, behind its content.
    """

    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


PLAIN_FORM = PromptForm()
