"""Chat templates rendered by Jinja alone give what transformers gives."""

from __future__ import annotations

import re
from functools import cache

import pytest
from chat_templates import TEMPLATES
from trained import trained

from mixlm.errors import TemplateError
from mixlm.tokenization.chat_template import ChatTemplate

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
CONVERSATIONS = {
    "user": [("user", "  Why <b>is</b> the sky 'blue' & \"wide\"?\n")],
    "system": [("system", "Be brief.\n"), ("user", "Hello 👋🏽 café\tx")],
    "turns": [("user", "One"), ("assistant", "<think>\nhm\n</think>\n\nTwo  "), ("user", "Three")],
    "late": [("user", "One"), ("assistant", "Two"), ("system", "B"), ("user", "Three")],
    "twice": [("system", "A"), ("system", "B"), ("user", "C")],
    "answered": [("user", "One"), ("assistant", "Two")],
}
ALL = {
    **TEMPLATES,
    "dictionaries": "{% set d = dict.fromkeys(['a'], messages[0].content) %}{{ d.a }}{{ dict(b=d)['b'] | length }}",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says the weather <here> & now: é",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


@cache
def reference():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=trained("gpt2"), **VARIABLES)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", ALL)
def test_a_template_renders_as_in_transformers(name, tools, generation):
    options = {"tools": tools, "add_generation_prompt": generation}
    template = ChatTemplate(ALL[name], reference().special_tokens_map, "the template")
    for conversation in CONVERSATIONS.values():
        turns = [{"role": role, "content": content} for role, content in conversation]
        try:
            expected = reference().apply_chat_template(turns, chat_template=ALL[name], tokenize=False, **options)
        except Exception:
            with pytest.raises(TemplateError):
                template.render(turns, **options)
        else:
            assert template.render(turns, **options) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if x %}", r"t, line 1: Unexpected end of template"),
        ("a\n{{ 1 +\n", r"t, line 2: "),
        ("a\n\n{{ 1 / (messages | length - 1) }}", r"t, line 3, fails: ZeroDivisionError: division by zero"),
        ("a\n{{ messages + 1 }}", r"t, line 2, fails: TypeError: "),
        ("{{ messages[0].content[7].x.y }}", r"t, line 1, fails: UndefinedError: "),
        ("{{ none() }}", r"t, line 1, fails: TypeError: "),
        ("{% macro f() %}\n{{ 'x'.index('y') }}{% endmacro %}\n{{ f() }}", r"t, line 2, fails: ValueError"),
        ("{{ ''.__class__.__mro__ }}", r"t, line 1, fails: SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", r"t, line 1, fails: SecurityError"),
        ("{% include 'x' %}", r"t, line 1, fails: "),
        ("{{ x | nothing }}", r"t, line 1: No filter named 'nothing'"),
        ("{{ raise_exception('never\nagain') }}", r"t refuses these messages: never$"),
    ],
)
def test_a_broken_template_is_an_error_with_its_line_and_reason(source, message):
    with pytest.raises(TemplateError) as error:
        ChatTemplate(source, {}, "t").render([{"role": "user", "content": "x"}])
    assert re.match(message, error.value.message), error.value.message
    assert "\n" not in error.value.message
