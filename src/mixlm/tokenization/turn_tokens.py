"""The tokens that a chat template writes around turns, whatever the tokenizer's files say about them.

Some files list `<|im_start|>` as an ordinary token. What a user types would then begin a turn, and `<|im_end|>` would
be part of a response. Tokens that open or close turns are control tokens; tokens that mark a part of what an assistant
writes, such as `<think>`, are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mixlm.errors import TemplateError

RenderProbe = Callable[..., str]
PROBE = "0123456789"
# How control tokens are spelled: <|im_end|>, <end_of_turn>, <｜User｜>, </s>, [INST], [|endofturn|].
_SHAPE = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|\[\|[^\s\[\]|]+\|\]|</?[^\s<>/|｜][^\s<>]*>|\[/?[A-Za-z][A-Za-z0-9_]*\]"
)
_TEXT = re.compile("think|thought|reason|tool|answer|image|audio|video|vision", re.IGNORECASE)


def looks_like_control(spelling: str) -> bool:
    """Return whether a token is spelled as control tokens are."""
    return _SHAPE.fullmatch(spelling) is not None


def turn_tokens(render: RenderProbe, tokenizer: Any) -> list[str]:
    """Return the spellings of tokens that a template writes around turns.

    Args:
        render: Renders turns, `render(turns, add_generation_prompt=…)`.
        tokenizer: A `tokenizers.Tokenizer`.
    """
    user_side, assistant_side = _around_turns(render)

    def found(texts: Iterable[str]) -> dict[str, None]:
        spellings = (match[0] for text in texts for match in _SHAPE.finditer(text))
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
    """Return what a template writes behind a response; empty where it refuses the conversation."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        return render(turns, add_generation_prompt=False).rpartition(PROBE)[2].lstrip()
    except TemplateError:
        return ""


def _around_turns(render: RenderProbe) -> tuple[list[str], list[str]]:
    """Return what a template writes in front of a user's turns and behind an assistant's, and in front of theirs."""
    user_side = [text_after_response(render)]
    assistant_side: list[str] = []
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
        turns = [{"role": role, "content": f"{PROBE}{number}"} for number, role in enumerate(roles)]
        try:
            rendered = render(turns, add_generation_prompt=True)
        except TemplateError:
            continue
        gaps = _gaps(rendered, [turn["content"] for turn in turns])
        for role, gap in zip((*roles, "assistant"), gaps, strict=False):
            (assistant_side if role == "assistant" else user_side).append(gap)
    return user_side, assistant_side


def _gaps(rendered: str, contents: Sequence[str]) -> list[str]:
    """Return the parts of a prompt between messages, in order; those that the prompt lacks are passed over."""
    gaps: list[str] = []
    for content in contents:
        before, probe, after = rendered.partition(content)
        gaps.append(before if probe else "")
        rendered = after if probe else rendered
    return [*gaps, rendered]


def _partner(spelling: str) -> str:
    """Return the other one of an opening and a closing token, such as "</s>" for "<s>"."""
    return spelling.replace("/", "", 1) if spelling[1] == "/" else f"{spelling[0]}/{spelling[1:]}"
