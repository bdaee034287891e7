"""Calls of functions in prompts and in completions: nothing is lost, and what is split can be joined again."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from chat_templates import CHATML, LLAMA3, TEMPLATES
from hypothesis import given
from hypothesis import strategies as st

from mixlm.errors import ConfigError
from mixlm.tokenization.call_parser import ArgumentsPart, CallBegin, ContentPart, ToolCallParser, split_calls
from mixlm.tokenization.chat_template import ChatTemplate
from mixlm.tokenization.conversation import ConversationRenderer
from mixlm.tokenization.prompt_encoder import PLAIN_FORM, PLAIN_TEMPLATE, PromptForm
from mixlm.tokenization.tool_calls import call_text
from mixlm.types import Message, Tool, ToolCall

WEATHER = Tool("get_weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
TOOLS = PromptForm(tools=(WEATHER,))
CALL = ToolCall("get_weather", '{"city": "Oslo"}', "call_1")
HISTORY = [
    Message("system", "Be brief."),
    Message("user", "Oslo?"),
    Message("assistant", "", (CALL,)),
    Message("tool", "12 degrees", (), "call_1"),
]
# The common form, as Hermes and Qwen have it in longer words.
NATIVE = """{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') }}
{%- if tools %}{{- '\n<tools>' }}{% for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}{{- '\n</tools>
Answer <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>' }}{% endif %}{{- '<|im_end|>\n' }}
{%- for message in messages %}{%- if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' + message.content }}
{%- for call in message.tool_calls %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>tool\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def renderer(template: str) -> ConversationRenderer:
    compiled = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}, "the template")
    return ConversationRenderer(compiled, "m")


@pytest.mark.parametrize("name", [*TEMPLATES, "plain", "native"])
def test_tools_calls_and_results_stand_in_every_prompt(name):
    rendered = renderer({**TEMPLATES, "plain": PLAIN_TEMPLATE, "native": NATIVE}[name])(HISTORY, TOOLS)
    spelled = rendered.replace("\\n", "\n").replace('\\"', '"')  # one template prints a text as Python does
    for text in ("get_weather", "The weather of a city.", "Be brief.", "Oslo?", '{"city": "Oslo"}', "12 degrees"):
        assert text in spelled
    assert '<tool_call>\n{"name"' in spelled
    assert spelled.count("The weather of a city.") == 1


def test_a_template_with_the_common_form_renders_all_itself():
    rendered = renderer(NATIVE)(HISTORY, TOOLS)
    compiled = ChatTemplate(NATIVE, {}, "t")
    assert "<|im_start|>tool\n12 degrees<|im_end|>" in rendered
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}' in rendered
    question = [Message("user", "Oslo?")]
    function = {"name": WEATHER.name, "description": WEATHER.description, "parameters": WEATHER.parameters}
    assert renderer(NATIVE)(question, TOOLS) == compiled.render(
        [{"role": "user", "content": "Oslo?"}], tools=[{"type": "function", "function": function}]
    )


def test_a_template_with_another_form_is_told_the_common_one():
    rendered = renderer(LLAMA3)([Message("system", "Be brief."), Message("user", "Oslo?")], TOOLS)
    assert "You have access to the following functions." in rendered
    assert "Be brief.\n\nTo call a function, answer with its name" in rendered


def test_a_template_that_leaves_out_tools_or_their_descriptions_gets_them_as_text():
    names_only = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHATML
    for template in (CHATML, names_only):
        rendered = renderer(template)([Message("user", "Oslo?")], TOOLS)
        assert rendered == renderer(template)([Message("user", "Oslo?")], TOOLS)
        assert '{"name": "get_weather", "description": "The weather of a city."' in rendered
    assert "<|im_start|>user\n<tool_response>\n12 degrees\n</tool_response>" in renderer(CHATML)(HISTORY, TOOLS)


def test_results_follow_each_other_in_one_message_where_templates_want_turns():
    calls = (CALL, ToolCall("get_weather", '{"city": "Rome"}', "call_2"))
    messages = [
        Message("user", "Both?"), Message("assistant", "I look.", calls),
        Message("tool", "12", (), "call_1"), Message("tool", "20", (), "call_2"),
    ]  # fmt: skip
    rendered = renderer(TEMPLATES["gemma"])(messages, TOOLS)
    assert "12\n</tool_response>\n<tool_response>\n20" in rendered
    assert "I look.\n" + call_text(calls[0]) + "\n" + call_text(calls[1]) in rendered


def test_arguments_that_are_no_json_are_given_as_text():
    messages = [*HISTORY[:2], Message("assistant", "", (ToolCall("get_weather", "Oslo!", "c"),)), HISTORY[3]]
    assert "Oslo!" in renderer(NATIVE)(messages, TOOLS)


def test_the_last_message_can_be_left_open():
    messages = [Message("user", "Oslo?"), Message("assistant", "It is <b> ")]
    for template in (CHATML, TEMPLATES["gemma"], PLAIN_TEMPLATE, TEMPLATES["qwen3"]):
        rendered = renderer(template)(messages, PromptForm(continue_final_message=True))
        assert rendered.endswith("It is <b> ")
    assert renderer(CHATML)(messages, PromptForm(add_generation_prompt=False)).endswith("<|im_end|>\n")


@pytest.mark.parametrize("answer", ["Paris", " Paris", "\nParis", ""])
def test_the_plain_prompt_of_an_open_message_is_that_of_the_completion_with_its_text(answer):
    render, question = renderer(PLAIN_TEMPLATE), Message("user", "Where?")
    prompt = render([question], PLAIN_FORM)
    open_end = PromptForm(continue_final_message=True)
    assert render([question, Message("assistant", answer)], open_end) == prompt + answer
    assert render([question], PromptForm(add_generation_prompt=False)) == prompt.removesuffix("Answer:")
    closed = render([question, Message("assistant", answer), question], PLAIN_FORM)
    assert closed == f"{prompt}{'' if answer[:1].isspace() else ' '}{answer}\n\n{prompt.removeprefix('<s>')}"


def test_variables_reach_the_template():
    form = PromptForm(variables={"enable_thinking": False})
    assert "enable_thinking" in renderer(TEMPLATES["qwen3"]).variables
    assert renderer(TEMPLATES["qwen3"])([Message("user", "x")], form).endswith("</think>\n\n")
    assert not renderer(CHATML).variables & {"enable_thinking", "reasoning_effort"}


TEXTS = st.text('ab<>\n /{}"\\', max_size=12).filter(lambda text: "<tool_call>" not in text)
CALLS = st.lists(
    st.builds(
        ToolCall, st.sampled_from(["f", "f2"]), st.dictionaries(st.text("a\n}<", max_size=3), TEXTS).map(json.dumps)
    ),
    max_size=3,
)


@pytest.mark.slow
@given(content=TEXTS, calls=CALLS, cuts=st.lists(st.integers(0, 400)))
def test_completions_are_split_as_they_grow(content, calls, cuts):
    text = content + "\n".join(map(call_text, calls))
    expected = "" if calls and not content.strip() else content
    assert split_calls(text, ["f", "f2"]) == (expected, tuple(calls))
    parser, parts = ToolCallParser(["f", "f2"]), []
    ends = sorted({*(cut for cut in cuts if cut < len(text)), len(text)})
    for start, end in zip([0, *ends], ends, strict=False):
        parts += parser.push(text[start:end])
    parts += parser.finish()
    assert "".join(part.text for part in parts if isinstance(part, ContentPart)) == expected
    assert [part.name for part in parts if isinstance(part, CallBegin)] == [call.name for call in calls]
    for number, call in enumerate(calls):
        pieces = [part.text for part in parts if isinstance(part, ArgumentsPart) and part.index == number]
        assert "".join(pieces) == call.arguments


def test_arguments_come_in_pieces_and_only_what_may_end_them_waits():
    parser = ToolCallParser(["f"])
    assert parser.push('Hm. <tool_call>\n{"name": "f", "arguments": {"a"') == [
        ContentPart("Hm. "), CallBegin(0, "f"), ArgumentsPart(0, '{"a"'),
    ]  # fmt: skip
    assert parser.push(": 1}") == [ArgumentsPart(0, ": 1")]
    assert parser.push("}\n</tool") == [ArgumentsPart(0, "}")]
    assert parser.push("_call>") == []
    assert parser.finish() == []


def test_without_functions_all_is_text():
    text = call_text(CALL)
    assert split_calls(text, []) == (text, ())


def test_what_was_cut_off_stays_a_call():
    assert split_calls('<tool_call>\n{"name": "f", "arguments": {"a"', ["f"]) == ("", (ToolCall("f", '{"a"'),))
    assert split_calls('x<tool_call>\n{"na', ["f"]) == ("x", ())
    assert split_calls("x <tool", ["f"]) == ("x <tool", ())


def test_arguments_that_are_nested_deeply_are_rendered_or_refused():
    renderer = ConversationRenderer(ChatTemplate(CHATML, {}, "m"), "m")
    for depth in (100, 300, 500, 700, 900, 100_000):
        call = ToolCall("f", "[" * depth + "]" * depth)
        with suppress(ConfigError):
            assert "[[[" in renderer([Message("user", "x"), Message("assistant", "", (call,))])
