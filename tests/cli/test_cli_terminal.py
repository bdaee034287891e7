"""What is seen at a terminal: colours, legend, stand-ins for control characters, and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from programs import SLOW, TOYS, Run, Terminal, process

from mixlm.terminal import visible

Start = Callable[..., Terminal]


def completion(run: Run, *arguments: str) -> Any:
    """Return the completion to "hello" with seed 3, as JSON says it."""
    return json.loads(run("generate", "hello", *TOYS, "--seed", "3", "--json", *arguments).out)


@pytest.mark.slow
def test_each_member_has_its_colour(run: Run, at_terminal: Start) -> None:
    terminal = at_terminal("generate", "hello", *TOYS, "--seed", "3", "-w", "1,3")
    assert terminal.end() == 0
    lines = terminal.screen.replace("\r", "").splitlines()
    legend = next(line for line in lines if "mixture by token" in line)
    assert "\x1b[38;5;32mtoy:1\x1b[0m 25%" in legend
    assert "\x1b[38;5;166mtoy:2\x1b[0m 75%" in legend
    codes = {"toy:1": 32, "toy:2": 166}
    pieces = [(codes[token["member"]], token["text"]) for token in completion(run, "-w", "1,3")["tokens"]]
    assert {code for code, _ in pieces} == {32, 166}
    assert lines[lines.index(legend) + 1] == "".join(f"\x1b[38;5;{code}m{text}\x1b[0m" for code, text in pieces)
    assert lines[-1].startswith("\x1b[2m")
    assert "tokens/s" in lines[-1]
    assert "loading" in terminal.screen


@pytest.mark.slow
def test_without_colours_the_same_lines_are_shown(run: Run, at_terminal: Start) -> None:
    terminal = at_terminal("generate", "hello", *TOYS, "--seed", "3", NO_COLOR="1")
    assert terminal.end() == 0
    assert "\x1b[38" not in terminal.screen
    assert "toy:1 50%  toy:2 50%  mixture by token" in terminal.screen
    assert f"\r\n{completion(run)['text']}\r\n" in terminal.screen.replace("\r\r", "\r")


@pytest.mark.slow
def test_one_member_needs_no_colour(at_terminal: Start) -> None:
    terminal = at_terminal("generate", "hello", "-m", "toy:1")
    assert terminal.end() == 0
    legend = terminal.screen.index("toy:1 100%")
    assert "\x1b[38" not in terminal.screen[legend:]


@pytest.mark.slow
def test_a_missing_prompt_at_a_terminal(at_terminal: Start) -> None:
    terminal = at_terminal("generate", *TOYS)
    assert terminal.end() == 2
    assert "there is no prompt" in terminal.screen
    assert "hint: " in terminal.screen


@pytest.mark.slow
def test_colours_can_be_forced_and_no_color_is_stronger() -> None:
    forced = process("generate", "hello", *TOYS, "--seed", "3", FORCE_COLOR="1")
    assert "\x1b[38;5;" in forced.out
    neither = process("generate", "hello", *TOYS, FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b" not in neither.out + neither.err


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31mb\x07\r\x9b\x7f\x00") == "a␛[31mb␇␍\ufffd␡␀"
    assert visible("line\n\ttab — ☃ 𝄞 [bold]") == "line\n\ttab — ☃ 𝄞 [bold]"


def test_a_text_cannot_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.engines import toy

    spoiled = tuple(b"\x1b[2J" + word if len(word) > 1 else word for word in toy.WORD_TOKENS)
    monkeypatch.setattr(toy.ToyEngine.__init__, "__defaults__", (spoiled, None))
    assert run("generate", "hello", *TOYS, "--seed", "3").out.startswith("\x1b[2J ")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = run("generate", "hello", *TOYS, "--seed", "3")
    assert "\x1b[2J" not in shown.out
    assert "␛[2J" in shown.out


@pytest.mark.slow
def test_ctrl_c_ends_generate_with_the_text_so_far(at_terminal: Start) -> None:
    terminal = at_terminal("generate", "hello", *TOYS, "--seed", "3", "--max-tokens", "4000", before=SLOW)
    terminal.wait_for("by token\x1b[0m\r\n\x1b[38;5;")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.screen.replace("\r", "").endswith("\nmixlm: interrupted\n")
    assert "Traceback" not in terminal.screen


@pytest.mark.slow
def test_ctrl_c_in_chat_stops_the_completion_and_not_the_program(at_terminal: Start) -> None:
    terminal = at_terminal("chat", *TOYS, "--seed", "3", "--max-tokens", "4000", before=SLOW)
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n\x1b[38;5;")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("> ", after=terminal.screen.index("stopped"))
    terminal.type("/help\n")
    terminal.wait_for("// begins a message")
    terminal.wait_for("> ", after=terminal.screen.index("// begins a message"))
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_chat(at_terminal: Start) -> None:
    terminal = at_terminal("chat", *TOYS)
    terminal.wait_for("> ")
    assert terminal.interrupt() == 0
    assert "Traceback" not in terminal.screen


@pytest.mark.slow
def test_check_shows_bars(at_terminal: Start) -> None:
    terminal = at_terminal("check", *TOYS, "--samples", "300")
    assert terminal.end() == 0
    assert "300/300" in terminal.screen
    assert "No difference was found: 300 completions per method" in terminal.screen


@pytest.mark.slow
def test_too_long_a_message_does_not_end_chat_at_a_terminal(at_terminal: Start) -> None:
    limit = "from mixlm.engines.toy import ToyEngine\nplain = ToyEngine.__init__\n"
    limit += "def short(self, *a, **k): plain(self, *a, **{**k, 'context_length': 40})\nToyEngine.__init__ = short\n"
    terminal = at_terminal("chat", *TOYS, before=limit)
    terminal.wait_for("> ")
    terminal.type("x" * 60 + "\n")
    terminal.wait_for("hint: /reset starts a new conversation")
    terminal.type("/exit\n")
    assert terminal.end() == 0
