"""The option `tools`, in the forms that callers give it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixlm.errors import ConfigError
from mixlm.types import Tool

TOOL_CHOICES = ("auto", "none", "required")
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")


def checked_tools(tools: Any) -> tuple[Tool, ...]:
    """Return tools of any form: `Tool`, or a mapping as in OpenAI's API, with or without its `function`.

    Raises:
        ConfigError: It is none of these, two functions have one name, or one is a word of `tool_choice`.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ConfigError(f"tools is {tools!r}; it must be a list of functions")
    checked = tuple(tool if isinstance(tool, Tool) else _tool(tool) for tool in tools)
    names = [tool.name for tool in checked]
    for tool in checked:
        if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
            raise ConfigError(
                f"tools has the function name {tool.name!r}; it must be 1 to 128 letters, digits and any of _.:/-"
            )
        if tool.name in TOOL_CHOICES:
            raise ConfigError(
                f"tools has the function name {tool.name!r}, which is a word of tool_choice", "rename the function"
            )
        if not isinstance(tool.description, str) or not isinstance(tool.parameters, Mapping):
            raise ConfigError(f"tools: {tool.name} needs a text as description and a JSON object as parameters")
        if names.count(tool.name) > 1:
            raise ConfigError(f"tools has two functions named {tool.name}")
    return checked


def check_tool_choice(choice: Any, tools: Sequence[Tool]) -> None:
    """Raise ConfigError for a choice that is neither a word nor the name of a tool."""
    names = [tool.name for tool in tools]
    if choice not in (*TOOL_CHOICES, *names):
        allowed = ", ".join((*TOOL_CHOICES, *names))
        raise ConfigError(f"tool_choice is {choice!r}; it must be one of {allowed}")
    if choice == "required" and not tools:
        raise ConfigError("tool_choice is 'required', and there are no tools", "give tools")


def _tool(tool: Any) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function" or "name" not in function:
        raise ConfigError(f"tools has {tool!r}; it must be a mixlm.Tool, or a dict with name, description, parameters")
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})
