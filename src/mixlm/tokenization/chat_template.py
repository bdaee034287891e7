"""Chat templates of Hugging Face models, rendered by Jinja alone.

The environment is the one that transformers renders in (`utils/chat_template_utils.py`), so a template gives the same
text here as `apply_chat_template` gives there, without the import of transformers.

The tokens that a template writes around turns are control tokens, whatever the tokenizer's files say about them. Some
files list `<|im_start|>` as an ordinary token: what a user types would then begin a turn, and `<|im_end|>` would be
part of a response. Tokens that mark a part of what an assistant writes, such as `<think>`, are text.
"""

from __future__ import annotations

import json
import re
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
from mixlm.types import Role

_HINT = "give the member a template of its own: template_file = PATH"
PROBE = "0123456789"
# How control tokens are spelled: <|im_end|>, <|turn>, <end_of_turn>, <｜User｜>, </s>, [INST], [|endofturn|].
_SHAPE = re.compile(
    r"<\|[^\s<>|]+\|?>|<｜[^\s<>｜]+｜>|\[\|[^\s\[\]|]+\|\]|</?[^\s<>/|｜][^\s<>]*>|\[/?[A-Za-z][A-Za-z0-9_]*\]"
)
_BRACKETS = frozenset("<>[]{}|｜")  # added tokens between these are control tokens too, such as ]~b]
_TEXT = re.compile("think|thought|reason|tool|answer|image|audio|video|vision", re.IGNORECASE)
_RESPONSES: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    # Some templates refuse to end with a response, or leave that of the last one open.
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
_CONVERSATIONS: tuple[tuple[Role, ...], ...] = (("user",), ("system", "user"), *_RESPONSES[2:])


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


def looks_like_control(spelling: str) -> bool:
    """Return whether an added token is spelled as control tokens are."""
    return _SHAPE.fullmatch(spelling) is not None or (len(spelling) > 2 and {spelling[0], spelling[-1]} <= _BRACKETS)


def turn_tokens(template: ChatTemplate, tokenizer: Any) -> list[str]:
    """Return the spellings of tokens that a template writes around turns.

    Args:
        template: The template.
        tokenizer: A `tokenizers.Tokenizer`.
    """
    user_side, assistant_side = _around_turns(template)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]

    def found(texts: Sequence[str]) -> dict[str, None]:
        spellings = [match[0] for text in texts for match in _SHAPE.finditer(text)]
        spellings += [token for text in texts for token in added if token in text and looks_like_control(token)]
        return dict.fromkeys(
            spelling
            for spelling in spellings
            if tokenizer.token_to_id(spelling) is not None and not _TEXT.search(spelling)
        )

    tokens = found(user_side)
    for spelling in found(assistant_side):
        partner = _partner(spelling)
        # A pair that stands only where an assistant begins encloses a part of its text.
        if tokenizer.token_to_id(partner) is None or partner == spelling or partner in tokens:
            tokens[spelling] = None
    return list(tokens)


def text_after_response(template: ChatTemplate) -> str:
    """Return what a template writes after a response; empty where that is nothing, or it takes no conversation."""
    for roles in _RESPONSES:
        gaps = _gaps(template, roles, add_generation_prompt=False)
        if gaps and (text := gaps[roles.index("assistant") + 1].lstrip()):
            return text
    return ""


def _around_turns(template: ChatTemplate) -> tuple[list[str], list[str]]:
    """Return what a template writes before a user's turns and after an assistant's, and before theirs."""
    user_side = [text_after_response(template)]
    assistant_side: list[str] = []
    for roles in _CONVERSATIONS:
        gaps = _gaps(template, roles, add_generation_prompt=True)
        for role, gap in zip((*roles, "assistant"), gaps, strict=False):
            (assistant_side if role == "assistant" else user_side).append(gap)
    return user_side, assistant_side


def _gaps(template: ChatTemplate, roles: Sequence[Role], *, add_generation_prompt: bool) -> list[str]:
    """Return what stands before, between and after the messages of a conversation; nothing if one is left out."""
    contents = [f"{PROBE}{number}" for number in range(len(roles))]
    for forms in (contents, [[{"type": "text", "text": content}] for content in contents]):
        turns = [{"role": role, "content": form} for role, form in zip(roles, forms, strict=True)]
        try:
            rendered = template.render(turns, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            continue
        gaps = re.split("|".join(contents), rendered)
        if len(gaps) == len(contents) + 1:
            return gaps
    return []


def _partner(spelling: str) -> str:
    """Return the other one of an opening and a closing token, such as "</s>" for "<s>"."""
    return spelling.replace("/", "", 1) if spelling[1] == "/" else f"{spelling[0]}/{spelling[1:]}"
