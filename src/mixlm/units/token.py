"""The unit `token`: members that share a vocabulary write token by token.

Whether they share one is decided by the tokens' bytes, not by names or sizes: ids that both use must spell the same.
Rows that only one of them uses (padding, extra special tokens) are masked; end-of-text of every kind is one symbol.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids
from mixlm.units.base import TokenBuffer


def conflict(vocabularies: Sequence[Vocabulary]) -> str | None:
    """Say why the members share no vocabulary, or return None when they do."""
    first = vocabularies[0]
    for other in vocabularies[1:]:
        both = zip(first.tokens, other.tokens, strict=False)
        differing = [i for i, (a, b) in enumerate(both) if a and b and a != b]
        if differing:
            i, count = differing[0], len(differing)
            a, b = first.tokens[i], other.tokens[i]
            return f"{count} ids spell different tokens, the first of them {i}: {a!r} and {b!r}"
    return None


class TokenUnit:
    """Symbols are the shared ids; the state is the ids themselves."""

    name = "token"

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self.end = max(one.size for one in vocabularies)
        common = min(one.size for one in vocabularies)
        spelled = [all(one.tokens[i] for one in vocabularies) for i in range(common)]
        shared = np.flatnonzero(spelled)
        self._tokens = vocabularies[0].tokens
        self._symbols = []
        for one in vocabularies:
            symbols = np.full(one.size, -1, dtype=np.int64)
            symbols[shared] = shared
            symbols[list(one.ends)] = self.end
            self._symbols.append(symbols)

    def symbols(self, member: int) -> Ids:
        """Return the shared symbol of each of the member's ids; -1 for masked rows."""
        return self._symbols[member]

    def data(self, symbol: int) -> bytes:
        """Return the bytes of a shared id."""
        return self._tokens[symbol]

    def begin(self, prompts: Sequence[Ids]) -> TokenState:
        """Return the empty state behind each member's prompt."""
        return TokenState(self, prompts)


class TokenState:
    """The shared ids written so far, behind each member's own prompt."""

    def __init__(self, unit: TokenUnit, prompts: Sequence[Ids]) -> None:
        self._unit = unit
        self._prompts = [prompt.size for prompt in prompts]
        self._buffers = [TokenBuffer(prompt) for prompt in prompts]

    def append(self, symbol: int) -> None:
        """Add one shared id."""
        for buffer in self._buffers:
            buffer.rewrite(0, [symbol])

    def cut(self, count: int) -> None:
        """Take back the last `count` ids."""
        for buffer in self._buffers:
            buffer.rewrite(count, [])

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and the shared ids."""
        return self._buffers[member].ids

    def prompt_length(self, member: int) -> int:
        """Return the length of the member's prompt."""
        return self._prompts[member]

    def tail(self, length: int) -> bytes:
        """Return the last bytes of the text."""
        written = self._buffers[0].ids[self._prompts[0] :]
        # A token has a byte at least, so no more than `length` of them are needed.
        data = b"".join(self._unit.data(int(i)) for i in written[max(len(written) - length, 0) :])
        return data[max(len(data) - length, 0) :]
