"""`mixlm chat`: a conversation at a terminal, or with one message per line from a pipe."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from mixlm.cli.display import Display, completion_fields, dim, print_json, show_figures
from mixlm.cli.inputs import STDIN, decode
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, flag, parse_numbers, with_shared
from mixlm.cli.run import say
from mixlm.errors import ConfigError, MixlmError, PromptTooLongError, UsageError, did_you_mean
from mixlm.terminal import has_colours, is_terminal

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.ensemble import ChatGeneration, Ensemble

_COMMANDS = {
    "/help": "show this list",
    "/retry": "another completion of the last message",
    "/reset": "start a new conversation",
    "/weights": "show the members' weights, or set them: /weights 0.7,0.3",
    "/system": "set the system message: /system Be brief. Without a text, remove it",
    "/seed": "set the seed: /seed 7",
    "/save": "write the conversation to a new file: /save chat.jsonl",
    "/exit": "end the chat; so do Ctrl-D, and Ctrl-C while nothing is being generated",
}
_TAKE_TEXT = ("/weights", "/system", "/seed", "/save")
_PROMPT = "> "
_MORE = ". "
_QUOTES = '"""'
# A Ctrl-C within this many seconds after a completion was meant to stop that completion.
_GRACE = 1.0


@with_shared()
def chat(
    shared: Shared,
    as_json: Annotated[bool, flag("--json", "Print each completion as one JSON object on its own line.")] = False,
) -> int:
    """Chat with an ensemble.

    Ctrl-C stops a completion; /help lists the commands. A message of several lines stands between lines that begin and
    end with three double quotes. From a pipe, each line is a message.
    """
    options = shared.options()
    conversation = Conversation(open_ensemble(shared, options, one_method=True, sequences=1), options)
    if not as_json:
        conversation.display().legend()
    if is_terminal(sys.stdin):
        dim("/help lists the commands; Ctrl-C stops a completion")
    ended = -_GRACE
    while (message := _read(ended)) is not None:
        try:
            command, argument = _command(message)
            if command == "/exit":
                break
            if command == "/retry":
                generation = conversation.retry()
            elif command is not None:
                _run(conversation, command, argument)
                continue
            elif message.strip():
                # A message may begin with a slash; a second one tells it from a command.
                generation = conversation.send(message.removeprefix("/") if message.startswith("//") else message)
            else:
                continue
            _complete(conversation, generation, as_json=as_json)
            ended = time.monotonic()
        except MixlmError as error:
            # A script learns of it from the exit code; at a terminal the conversation can continue.
            if not is_terminal(sys.stdin):
                raise
            hint = "/reset starts a new conversation" if isinstance(error, PromptTooLongError) else error.hint
            say(f"mixlm: error: {error.message}" + (f"\nhint: {hint}" if hint else ""))
    return 0


def _run(conversation: Conversation, command: str, argument: str) -> None:
    """Run a command that completes nothing."""
    if command == "/help":
        for name, text in _COMMANDS.items():
            dim(f"{name:<9} {text}")
        dim(f"{_QUOTES} begins a message of several lines, and ends it; // begins a message that begins with a slash")
    elif command == "/reset":
        conversation.reset()
        dim("a new conversation")
    else:
        actions = {"/weights": conversation.set_weights, "/system": conversation.set_system}
        actions |= {"/seed": conversation.set_seed, "/save": conversation.save}
        dim(actions[command](argument))


def _complete(conversation: Conversation, generation: ChatGeneration, *, as_json: bool) -> None:
    """Generate one completion. Ctrl-C stops it; the text so far stays in the history."""
    display = conversation.display()
    stopped = False
    try:
        for token in generation:
            if not as_json:
                display.write(token)
    except KeyboardInterrupt:
        stopped = True
    finally:
        if not as_json:
            display.end()
    if as_json:
        print_json(completion_fields(conversation.ensemble, generation.completion), indent=None)
        return
    if stopped:
        dim("stopped")
    show_figures(conversation.ensemble, generation.completion)


def _read(ended: float) -> str | None:
    """Return the next message, or None at the end of input and for Ctrl-C.

    ended: when the last completion did, by `time.monotonic`. Ctrl-C right after it returns an empty message.
    """
    try:
        line = _line(_PROMPT)
        return _block(line) if line.lstrip().startswith(_QUOTES) else line
    except EOFError:
        stay = False
    except KeyboardInterrupt:
        stay = time.monotonic() - ended < _GRACE
    if is_terminal(sys.stdin):
        print(file=sys.stderr, flush=True)
    return "" if stay else None


def _block(line: str) -> str:
    """Return the message that a line with three quotes begins. Raises UsageError if the input ends within it."""
    lines = [line.lstrip().removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(_line(_MORE))
        except EOFError:
            raise UsageError(
                f"the input ends within a message that {_QUOTES} begins", f"end it with {_QUOTES}"
            ) from None
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _line(prompt: str) -> str:
    """Return one line of standard input. Raises EOFError at its end."""
    if not is_terminal(sys.stdin):
        if sys.stdin is None or not (data := sys.stdin.buffer.readline()):
            raise EOFError
        return decode(STDIN, data).removesuffix("\n").removesuffix("\r")
    if not is_terminal(sys.stdout):
        # Stdout is for the completions only.
        print(prompt, end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and a history
    # \1 and \2 tell readline which characters have no width.
    return input(f"\1\x1b[1m\2{prompt}\1\x1b[0m\2" if has_colours(sys.stdout) else prompt)


def _command(message: str) -> tuple[str | None, str]:
    """Return a command and its argument; None for a message.

    A command is a line whose first word begins with a slash, and has no other: /usr/bin is a message.

    Raises:
        UsageError: There is no such command, or it takes no argument.
    """
    word, *rest = message.strip().split(None, 1) or [""]
    if not word.startswith("/") or "/" in word[1:] or "\n" in message:
        return None, ""
    if word not in _COMMANDS:
        raise UsageError(
            f"there is no command {word}",
            did_you_mean(word, _COMMANDS) or "/help lists them; a message that begins with a slash begins with two",
        )
    argument = "".join(rest)
    if argument and word not in _TAKE_TEXT:
        raise UsageError(f"{word} takes no argument, and has {argument!r}", f"write {word} alone")
    return word, argument


class Conversation:
    """A conversation whose weights, system message and seed can change between turns."""

    def __init__(self, ensemble: Ensemble, options: Options) -> None:
        self.ensemble = ensemble
        self._options = options.copy()
        self._turns = 0
        self._chat = ensemble.chat(**self._options)

    def display(self) -> Display:
        """Return what shows the completions."""
        return Display(self.ensemble, self.ensemble.settings(**self._options).method)

    def send(self, text: str) -> ChatGeneration:
        """Add a user's message, and return the completion in progress."""
        generation = self._chat.stream(text)
        self._turns += 1
        return generation

    def retry(self) -> ChatGeneration:
        """Drop the last completion, and return another one for the same message. Raises UsageError if there is none."""
        if len(self._chat.messages) < 2:
            raise UsageError("/retry repeats the last message, and there is none", "write one")
        text = self._chat.messages[-2].content
        last = self._chat.messages[-2:]
        del self._chat.messages[-2:]
        try:
            return self.send(text)
        except BaseException:
            self._chat.messages.extend(last)
            raise

    def reset(self) -> None:
        """Start a new conversation, with the first turn's random numbers again."""
        self._turns = 0
        self._chat = self.ensemble.chat(**self._options)

    def set_weights(self, text: str) -> str:
        """Set the weights of the next turns, or return them as they are if `text` is empty."""
        if text:
            self._continue(self.ensemble.with_weights(parse_numbers("/weights", text, "/weights 0.7,0.3")), {})
        pairs = zip(self.ensemble.names, self.ensemble.weights, strict=True)
        return "weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)

    def set_system(self, text: str) -> str:
        """Set the system message of the whole conversation; an empty one removes it."""
        self._continue(self.ensemble, {"system": text or None})
        return "a new system message" if text else "no system message"

    def set_seed(self, text: str) -> str:
        """Set the seed of the next turns."""
        if not text.isascii() or not text.isdigit():
            raise ConfigError(f"/seed is {text!r}; it must be a whole number, 0 or more", "such as: /seed 7")
        self._continue(self.ensemble, {"seed": int(text)})
        return f"seed {int(text)}"

    def save(self, text: str) -> str:
        """Write the conversation to a new file, as a line that `mixlm generate --input` reads."""
        if not text:
            raise UsageError("/save names no file", "such as: /save chat.jsonl")
        path = Path(text).expanduser()
        messages = [{"role": message.role, "content": message.content} for message in self._chat.messages]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}) + "\n")
        except FileExistsError:
            raise ConfigError(f"{path} exists", "name a new file") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}", "name a file in a folder") from error
        return f"{len(messages)} messages written to {path}"

    def _continue(self, ensemble: Ensemble, change: Options) -> None:
        """Continue the conversation with these members and options, each turn with random numbers of its own."""
        options = cast("Options", {**self._options, **change})
        ensemble.context(ensemble.settings(**options))  # a rule may take no weights
        chat = ensemble.chat(**cast("Options", {**options, "sequence": self._turns}))
        chat.messages = self._chat.messages
        self.ensemble, self._options, self._chat = ensemble, options, chat
