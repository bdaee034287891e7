"""Every message stands in the prompt, or a refusal names it."""

from __future__ import annotations

import re

import pytest
from chat_templates import CHATML, DEEPSEEK, GEMMA, GEMMA1, LLAMA2, MISTRAL, PARTS, PHI3_OLD, QWEN3, TEMPLATES
from jinja2 import Environment

from mixlm.errors import ConfigError, TemplateError
from mixlm.tokenization.chat_template import ChatTemplate
from mixlm.tokenization.conversation import ConversationRenderer
from mixlm.tokenization.prompt_encoder import PLAIN_TEMPLATE
from mixlm.types import Message

CONVERSATIONS = [
    "SSu",
    "uaSu",
    "Su",
    "Sau",
    "u",
    "uau",
    "uS",
    "uSu",
    "S",
    "uauS",
    "uaS",
    "Suau",
    "SuaSSu",
    "SS",
    "uSSa",
]


def conversation(roles: str) -> list[Message]:
    """Return messages with the same, short text as little as possible: a letter stands in most templates too."""
    names = {"S": "system", "u": "user", "a": "assistant"}
    texts = ["B", "user", "  x\n", 'a "b" <c> & d', "assistant", "1", "é\n\n- y"]
    return [Message(names[role], text) for role, text in zip(roles, texts, strict=False)]


def render(template: str, messages: list[Message]) -> str:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ConversationRenderer(ChatTemplate(template, variables, "the template"), "m")(messages)


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


@pytest.mark.parametrize("roles", CONVERSATIONS)
@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_every_text_is_in_the_prompt_in_its_order_or_the_member_is_named(name, roles):
    messages = conversation(roles)
    try:
        rendered = render({**TEMPLATES, "plain": PLAIN_TEMPLATE}[name], messages)
    except TemplateError as error:
        assert re.search(r"of m leaves out message \d+ of \d+|the template.* (refuses|fails)", str(error))  # noqa: PT017
        assert name != "plain" or "S" not in roles
        return
    position = 0
    for message in messages:
        assert message.content.strip() in rendered
        if message.role != "system":
            position = rendered.index(message.content.strip(), position) + len(message.content.strip())


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_takes_is_rendered_as_it_stands(name):
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}, "t")
    content = [{"type": "text", "text": "Why?"}] if name == "parts" else "Why?"
    assert render(TEMPLATES[name], [user("Why?")]) == template.render([{"role": "user", "content": content}])


def test_system_text_joins_the_first_user_message_where_a_template_refuses_it():
    assert "user\nS\n\nU<end" in render(GEMMA1, [system("S"), user("U")])
    assert "user\nS\n\nT\n\nU<end" in render(GEMMA1, [system("S"), system("T"), user("U")])
    assert "user\nT\n\nV<end" in render(GEMMA1, [user("U"), assistant("A"), system("T"), user("V")])
    with pytest.raises(TemplateError, match="System role not supported"):
        render(GEMMA1, [system("S")])


def test_system_text_before_an_assistant_turn_joins_the_user_message_behind_it_or_is_refused():
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert render(no_system, [system("S"), assistant("A"), user("U")]) == (
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nS\n\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateError, match="System role not supported"):
        render(GEMMA1, [system("S"), assistant("A"), user("U")])  # it refuses a beginning with the assistant too


def test_a_template_that_reads_the_first_system_message_only_gets_all_of_them_there():
    rendered = render(GEMMA, [system("S"), system("T"), user("U")])
    assert rendered == "<s><start_of_turn>user\nS\n\nT\n\nU<end_of_turn>\n<start_of_turn>model\n"
    assert "[INST] <<SYS>>\nS\n\nT\n<</SYS>>\n\nU [/INST]".replace("\n", "\\n") in render(
        LLAMA2, [system("S"), system("T"), user("U")]
    ).replace("\n", "\\n")


def test_a_template_with_branches_for_user_and_assistant_only_gets_system_text_in_a_user_message():
    assert render(PHI3_OLD, [system("S"), user("U")]) == "<s><|user|>\nS\n\nU<|end|>\n<|assistant|>\n"


def test_a_template_that_loops_over_parts_gets_parts():
    assert render(PARTS, [system("S"), user("U")]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "[{" not in render(PARTS, [user("U")])


def test_a_template_that_refuses_strings_gets_parts_for_empty_texts_too():
    loop = "{% for message in messages %}"
    strict = PARTS.replace(loop, loop + "{% if message.content is string %}{{ raise_exception('no') }}{% endif %}")
    assert render(strict, [user("U"), assistant(""), user("V")]).count("<|im_start|>assistant\n") == 2


def test_a_template_with_a_string_for_the_system_and_parts_for_the_rest():
    mixed = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ 'S:' + m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    assert render(mixed, [system("S"), user("U")]) == "S:SU"


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{{ messages[0].content }}", r"message 3 of 3 \(user\)|message 2 of 3 \(assistant\)"),
        ("{{ messages[-1].content }}", r"message 1 of 3 \(user\)"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", r"message 1 of 3 \(user\)"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", r"message 1 of 3 \(user\)"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", r"message 2 of 3 \(assistant\)"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", r"2 of 3 \(assis"),
        ("Question Whence Where: no text at all", r"message 1 of 3 \(user\)"),
    ],
)
def test_a_text_that_a_template_leaves_out_is_named(template, lost):
    with pytest.raises(TemplateError, match=lost) as error:
        render(template, [user("Whence?"), assistant("Where"), user("Whither?")])
    assert "of m leaves out" in error.value.message


@pytest.mark.parametrize("text", ["a", "user", "1", "<|im_end|>", "}", "\n"])
def test_a_short_text_is_not_found_in_the_templates_own(text):
    template = "a user 1 <|im_end|> } assistant {{ messages[-1].content }}"
    messages = [user(text), assistant("yes"), user("no")]
    if text.strip():
        with pytest.raises(TemplateError, match="leaves out message 1 of 3"):
            render(template, messages)


@pytest.mark.parametrize("shown", ["m.content | length > 3", "m.content not in ['s', 'n']"])
def test_a_text_that_is_left_out_for_what_it_is_is_not_found_in_the_templates_own(shown):
    template = "{% for m in messages %}{% if " + shown + " %}{{ m.content }} {% endif %}{% endfor %}<assistant>"
    assert render(template, [user("Whence?")]) == "Whence? <assistant>"
    with pytest.raises(TemplateError, match=r"message 2 of 2 \(user\)"):
        render(template, [user("Whence?"), user("s")])


def test_thinking_may_be_left_out_where_a_text_begins_with_it():
    template = (
        "{% for m in messages %}{% set begins = m.content.startswith('<think>') %}"
        "{{ m.content.split('</think>')[-1] if begins else m.content }}{% endfor %}"
    )
    assert render(template, [user("a"), assistant("<think>\nb\n</think>c"), user("d")]) == "acd"


@pytest.mark.parametrize(
    "form", ["m.content | tojson", "m.content | e", "m.content | trim", "m.content.split() | join('')"]
)
def test_an_escaped_text_is_there(form):
    assert render("{% for m in messages %}{{ " + form + " }}{% endfor %}", [system(' "é" <b>\n\\x'), user("&")])


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK])
def test_a_template_may_leave_the_thinking_of_earlier_turns_out(template):
    messages = [user("U"), assistant("<think>\nlong\n</think>\n\nA"), user("V")]
    rendered = render(template, messages)
    assert "A" in rendered
    assert "long" not in rendered


def test_a_template_may_put_system_text_where_it_belongs():
    rendered = render(MISTRAL, [system("S"), user("U"), assistant("A"), user("V")])
    assert rendered == "<s>[INST] U[/INST] A</s>[INST] S\n\nV[/INST]"


def test_no_messages_are_refused():
    with pytest.raises(ConfigError, match="no messages"):
        render(CHATML, [])


def test_the_plain_template_keeps_later_system_messages():
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    turns = [{"role": role, "content": text} for role, text in [("system", "A"), ("system", "B"), ("user", "C")]]
    template = environment.from_string(PLAIN_TEMPLATE)
    rendered = template.render(messages=turns, bos_token="<s>", add_generation_prompt=True)
    assert rendered == "<s>A\n\nB\n\nQuestion: C\nAnswer:"
