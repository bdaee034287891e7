"""The tokens that a chat template writes around turns, whatever the tokenizer's files say about them.

Some files list `<|im_start|>` as an ordinary token. What a user types would then begin a turn, and `<|im_end|>` would
be part of a response. Tokens that open or close turns are control tokens; tokens that mark a part of what an assistant
writes, such as `<think>`, are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mixlm.errors import TemplateError
from mixlm.types import Role

RenderProbe = Callable[..., str]
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


def looks_like_control(spelling: str) -> bool:
    """Return whether an added token is spelled as control tokens are."""
    return _SHAPE.fullmatch(spelling) is not None or (len(spelling) > 2 and {spelling[0], spelling[-1]} <= _BRACKETS)


def turn_tokens(render: RenderProbe, tokenizer: Any) -> list[str]:
    """Return the spellings of tokens that a template writes around turns.

    Args:
        render: Renders turns, `render(turns, add_generation_prompt=…)`.
        tokenizer: A `tokenizers.Tokenizer`.
    """
    user_side, assistant_side = _around_turns(render)
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


def text_after_response(render: RenderProbe) -> str:
    """Return what a template writes behind a response; empty where that is nothing, or it takes no conversation."""
    for roles in _RESPONSES:
        gaps = _gaps(render, roles, add_generation_prompt=False)
        if gaps and (text := gaps[roles.index("assistant") + 1].lstrip()):
            return text
    return ""


def _around_turns(render: RenderProbe) -> tuple[list[str], list[str]]:
    """Return what a template writes in front of a user's turns and behind an assistant's, and in front of theirs."""
    user_side = [text_after_response(render)]
    assistant_side: list[str] = []
    for roles in _CONVERSATIONS:
        gaps = _gaps(render, roles, add_generation_prompt=True)
        for role, gap in zip((*roles, "assistant"), gaps, strict=False):
            (assistant_side if role == "assistant" else user_side).append(gap)
    return user_side, assistant_side


def _gaps(render: RenderProbe, roles: Sequence[Role], *, add_generation_prompt: bool) -> list[str]:
    """Return what stands before, between and behind the messages of a conversation; nothing if one is left out."""
    contents = [f"{PROBE}{number}" for number in range(len(roles))]
    for forms in (contents, [[{"type": "text", "text": content}] for content in contents]):
        turns = [{"role": role, "content": form} for role, form in zip(roles, forms, strict=True)]
        try:
            rendered = render(turns, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            continue
        gaps = re.split("|".join(contents), rendered)
        if len(gaps) == len(contents) + 1:
            return gaps
    return []


def _partner(spelling: str) -> str:
    """Return the other one of an opening and a closing token, such as "</s>" for "<s>"."""
    return spelling.replace("/", "", 1) if spelling[1] == "/" else f"{spelling[0]}/{spelling[1:]}"
