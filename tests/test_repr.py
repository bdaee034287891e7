"""Objects show themselves in one or two lines, and a completion in colours in a notebook."""

from __future__ import annotations

import gc
import weakref

import mixlm
from mixlm.core.options import OPTIONS


def test_objects_show_themselves():
    pair = mixlm.load("toy:1", "toy:2", weights=[3, 1])
    assert repr(pair) == "<Ensemble of toy:1 (toy, 0.75), toy:2 (toy, 0.25); unit='token', method='mixture'>"
    routed = mixlm.load("toy:1", "toy:2", router=lambda prompt, text: [1, 1])
    assert "router=FunctionRouter" in repr(routed)
    stream = pair.stream("x", seed=1, max_tokens=60, ignore_end=True)
    assert repr(stream).startswith("<Generation in progress: 0 tokens")
    completion = stream.finish()
    assert repr(stream).startswith("<Generation finished: 60 tokens")
    assert repr(completion).startswith("<Completion '")
    assert repr(completion).endswith(": 60 tokens, length, seed 1>")
    assert repr(pair.generate("x", seed=1, max_tokens=1)).endswith(": 1 token, length, seed 1>")
    chat = pair.chat(max_tokens=2)
    chat.send("a")
    assert repr(chat) == "<Chat of 2 messages with toy:1, toy:2>"
    for shown in (pair, stream, completion, chat):
        assert repr(shown).count("\n") == 0


def test_a_completion_is_coloured_and_escaped_in_a_notebook():
    member = mixlm.load("toy:1").generate("x", seed=1, max_tokens=1).usage.members
    usage = mixlm.Usage(1, 1, 0.0, 0.0, member)
    token = mixlm.Token("<b>", b"<b>", "toy:1", 0.0)
    html = mixlm.Completion("<b>", (token,), "stop", 0, usage)._repr_html_()
    assert 'title="toy:1">&lt;b&gt;</span>' in html


def test_running_generations_and_conversations_are_coloured_too():
    pair = mixlm.load("toy:1", "toy:2")
    stream = pair.stream("x", seed=1, max_tokens=20, ignore_end=True)
    assert stream._repr_html_() == '<pre style="white-space:pre-wrap"></pre>'
    read = [next(stream) for _ in range(6)]
    shown = stream._repr_html_()
    assert shown.count("</span>") == 6 == sum(f'title="{token.member}"' in shown for token in read)
    assert stream.finish()._repr_html_() == stream._repr_html_()
    chat = pair.chat(max_tokens=4, seed=1)
    chat.send("<i>")
    turn = chat.stream("b")
    next(turn)
    shown = chat._repr_html_()
    assert "<b>user</b><pre" in shown
    assert "&lt;i&gt;" in shown
    assert turn._repr_html_() in shown
    assert repr(turn).startswith("<Generation in progress: ")
    chat.messages[1] = mixlm.Message("assistant", "edited")
    assert '<pre style="white-space:pre-wrap">edited</pre>' in chat._repr_html_()


def test_the_docstring_of_generate_lists_every_option():
    for name in OPTIONS:
        assert f"\n    {name}: " in mixlm.Ensemble.generate.__doc__
    assert "--" not in mixlm.Ensemble.generate.__doc__  # Python's words


def test_a_chat_keeps_of_earlier_turns_what_was_written():
    chat = mixlm.load("toy:1", "toy:2").chat(max_tokens=2, seed=1)
    turn = chat.stream("a")
    list(turn)
    generation = weakref.ref(turn)
    del turn
    gc.collect()
    assert generation() is None
