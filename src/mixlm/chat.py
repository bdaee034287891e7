"""Conversations that remember their turns, and whose members keep their KV caches between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from mixlm.core.options import Options
from mixlm.generation.generation import Generation
from mixlm.types import Completion, Message, Token, colored_html

if TYPE_CHECKING:
    from mixlm.ensemble import Ensemble


class Chat:
    """A conversation. A turn that is interrupted stays in the history as far as it was generated."""

    def __init__(self, ensemble: Ensemble, options: Options) -> None:
        self._ensemble = ensemble
        self._options = options
        self._sessions = [member.engine.session() for member in ensemble.members]
        self._turns: list[_Turn] = []
        self.messages: list[Message] = []

    def __repr__(self) -> str:
        return f"<Chat of {len(self.messages)} messages with {', '.join(self._ensemble.names)}>"

    def _repr_html_(self) -> str:
        """Return the conversation for a notebook, each token of the completions in its member's colour."""
        tokens = {id(turn.message): turn.tokens for turn in self._turns}
        return "".join(
            f"<b>{escape(message.role)}</b>"
            + (
                colored_html(tokens[id(message)], self._ensemble.names)
                if id(message) in tokens
                else f'<pre style="white-space:pre-wrap">{escape(message.content)}</pre>'
            )
            for message in self.messages
        )

    def send(self, text: str) -> Completion:
        """Add a user's message and return the whole completion."""
        for _ in (generation := self.stream(text)):
            pass
        return generation.completion

    def stream(self, text: str) -> ChatGeneration:
        """Add a user's message and iterate over the completion. The message joins the history once it fits."""
        options = self._ensemble.settings(**self._options).with_sequence_offset(len(self._turns))
        prompt = self._ensemble.encode_prompt([*self.messages, Message("user", text)], options)
        generation = self._ensemble.context(options, self._sessions).start(prompt)
        self._turns.append(_Turn(Message("assistant", "")))
        self.messages.append(Message("user", text))
        return ChatGeneration(generation, self.messages, self._turns[-1])


@dataclass(slots=True)
class _Turn:
    """What has been read of a completion: the message in the history, and its tokens."""

    message: Message
    tokens: list[Token] = field(default_factory=list)


class ChatGeneration(Iterator[Token]):
    """A turn of a conversation in progress."""

    def __init__(self, generation: Generation, messages: list[Message], turn: _Turn) -> None:
        self._generation = generation
        self._messages = messages
        self._turn = turn
        self._index = len(messages)
        messages.append(turn.message)

    def __repr__(self) -> str:
        return repr(self._generation)

    def _repr_html_(self) -> str:
        """Return the text so far for a notebook."""
        return self._generation._repr_html_()

    def __next__(self) -> Token:
        token = next(self._generation)
        self._turn.tokens.append(token)
        content = self._messages[self._index].content + token.text
        self._turn.message = self._messages[self._index] = Message("assistant", content)
        return token

    @property
    def message(self) -> Message:
        """What has been read of it, the last message of the history."""
        return self._turn.message

    @property
    def completion(self) -> Completion:
        """The completion so far."""
        return self._generation.completion
