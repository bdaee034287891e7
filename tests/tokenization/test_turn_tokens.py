"""The tokens around turns, whatever a template takes and wherever it writes them."""

from __future__ import annotations

import pytest
from chat_templates import CHATML, PARTS
from tokenizers import AddedToken
from trained import trained

from mixlm.tokenization.chat_template import ChatTemplate, looks_like_control, text_after_response, turn_tokens

_BARE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
_REFUSE = "{% if CONDITION %}{{ raise_exception('no') }}{% endif %}" + _BARE
# A template, its control tokens, and the one behind a response.
TEMPLATES = {
    "parts": (PARTS, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "no strings": (
        "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no') }}{% endif %}"
        "{{ '<|im_start|>' + m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>' }}"
        "{% endfor %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "a system message first": (
        _REFUSE.replace("CONDITION", "messages[0].role != 'system'"),
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "a user's message last": (
        _REFUSE.replace("CONDITION", "messages[-1].role != 'user'"),
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "the last turn open": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "the next turn is the end": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>", "<|assistant|>"],
        "<|user|>",
    ),
    "one bar": (
        "{% for m in messages %}{{ '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}{% endfor %}",
        ["<|turn>", "<turn|>"],
        "<turn|>",
    ),
    "other brackets": (
        "{{ ']~!b[' }}{% for m in messages %}{{ ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{% endfor %}",
        ["]~!b[", "]~b]", "[e~["],
        "[e~[",
    ),
    "no response at all": ("{{ messages[0].content }}", [], ""),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_around_turns_are_found_in_every_form_of_template(name):
    template, control, end = TEMPLATES[name]
    tokenizer = trained("gpt2")
    text_tokens = ["\n\n", "user", "<think>", "<table>"]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*control, *text_tokens)])
    compiled = ChatTemplate(template, {}, "the template")
    assert sorted(turn_tokens(compiled, tokenizer)) == sorted(control)
    assert text_after_response(compiled).startswith(end)
    assert end or text_after_response(compiled) == ""


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        *(("<|im_end|>", True), ("<|turn>", True), ("<turn|>", True), ("</s>", True), ("[INST]", True)),
        *(("<｜User｜>", True), ("[e~[", True), ("]~b]", True), ("", False), ("[", False), ("<>", False)),
        *(("user", False), ("\n\n", False), ("<a", False), ("x]", False), ("._.", False)),
    ],
)
def test_control_tokens_stand_between_brackets(spelling, expected):
    assert looks_like_control(spelling) is expected
