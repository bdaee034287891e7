"""The conversation of `mixlm chat`, and the commands that change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mixlm.cli.display import Display
from mixlm.cli.options import parse_numbers
from mixlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mixlm.chat import ChatGeneration
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble


class Conversation:
    """A conversation whose weights, system message and seed can change between turns.

    Args:
        ensemble: The ensemble.
        options: The generation options of every turn.
    """

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
            ensemble = self.ensemble.with_weights(parse_numbers("/weights", text, "/weights 0.7,0.3"))
            ensemble.context(ensemble.settings(**self._options))  # a rule may take no weights
            self.ensemble = ensemble
            self._renew()
        pairs = zip(self.ensemble.names, self.ensemble.weights, strict=True)
        return "weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)

    def set_system(self, text: str) -> str:
        """Set the system message of the whole conversation; an empty one removes it."""
        self._change(cast("Options", {"system": text or None}))
        return "a new system message" if text else "no system message"

    def set_seed(self, text: str) -> str:
        """Set the seed of the next turns."""
        if not text.isascii() or not text.isdigit():
            raise ConfigError(f"/seed is {text!r}; it must be a whole number, 0 or more", "such as: /seed 7")
        self._change(cast("Options", {"seed": int(text)}))
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

    def _change(self, change: Options) -> None:
        """Apply options to the next turns, once they have been checked."""
        options = cast("Options", {**self._options, **change})
        self.ensemble.settings(**options)
        self._options = options
        self._renew()

    def _renew(self) -> None:
        """Continue the conversation with the current ensemble and options, each turn with random numbers of its own."""
        messages = self._chat.messages
        sequence = self._options.get("sequence", 0) + self._turns
        self._chat = self.ensemble.chat(**cast("Options", {**self._options, "sequence": sequence}))
        self._chat.messages = messages
