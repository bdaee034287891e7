"""Chat templates of Hugging Face models, rendered by Jinja alone.

The environment is the one that transformers renders in (`utils/chat_template_utils.py`), so a template gives the same
text here as `apply_chat_template` gives there, without the import of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from traceback import walk_tb
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mixlm.errors import TemplateError

_HINT = "give the member a template of its own: template_file = PATH"


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The template.
        variables: What the template may name besides the conversation: special tokens such as `bos_token`.
        origin: Where the template comes from, for messages.

    Attributes:
        variables: The names that the template takes from outside.

    Raises:
        TemplateError: The template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], origin: str) -> None:
        self._variables = dict(variables)
        self._origin = origin
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{origin}, line {error.lineno}: {_sentence(error)}", _HINT) from error
        except Exception as error:  # an invalid constant, such as 1 // 0, fails when it is compiled
            raise TemplateError(f"{origin}: {_sentence(error)}", _HINT) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation.

        Args:
            messages: Each has "role" and "content".
            add_generation_prompt: Whether to end where a response begins.
            tools: JSON schemas of functions.
            variables: Further ones that the template may name.

        Raises:
            TemplateError: The template refuses the conversation (`raise_exception`), or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **(variables or {})},
            )
        except _RefusedError as error:
            raise TemplateError(f"{self._origin} refuses these messages: {_sentence(error)}", _HINT) from error
        except Exception as error:  # whatever an expression in a template may raise
            line = _line(error)
            detail = f"{type(error).__name__}: {_sentence(error)}"
            raise TemplateError(f"{self._origin}{line} fails: {detail}", _HINT) from error


class _RefusedError(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks what the assistant wrote; here its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """`namespace()` without attributes that begin with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not store the attribute {name!r} on a namespace")
        Namespace.__setitem__(self, name, value)


class _Dict:
    """`dict()` and `dict.fromkeys()` without the other attributes of the class."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": _Dict(),
        "namespace": _TemplateNamespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _sentence(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _line(error: BaseException) -> str:
    """Return the line of the template that an error comes from, in words."""
    lines = [
        line
        for frame, line in walk_tb(error.__traceback__)
        if "__jinja_template__" in frame.f_globals or frame.f_code.co_filename == "<template>"
    ]
    return f", line {lines[-1]}," if lines else ""
