"""Biases by text: what is added to the logits of a member's tokens that have exactly given bytes.

Members have token ids of their own, so a text stands for a token in each of them; several ids of a member that have the
same bytes are biased alike. An id is taken where members share a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mixlm.errors import ConfigError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, LogitBias

Given = Mapping[str | int, float]


def bias_of(given: Given, vocabulary: Vocabulary, symbols: Ids, name: str, unit: str) -> LogitBias | None:
    """Return a member's bias, None where nothing is given.

    given: by a token's text, or in the unit "token" by its id. symbols: the shared symbol of each of the member's ids,
    int64 (vocab,), -1 for those it may not draw. Raises ConfigError for a text that is none of the member's tokens, and
    for an id that members have no common token for.
    """
    if not given:
        return None
    texts: dict[bytes, float] = {}
    found: dict[int, float] = {}
    for key, value in given.items():
        if isinstance(key, str):
            texts[key.encode(errors="surrogatepass")] = value
            continue
        if unit != "token":
            raise ConfigError(
                f"logit_bias has the token id {key}, and in the unit {unit} each member has token ids of its own",
                "give the token's text",
            )
        if key >= len(symbols) or symbols[key] < 0:
            raise ConfigError(f"logit_bias has the token id {key}, and {name} has no token of that id to draw")
        found[key] = value
    if texts:
        drawable = np.flatnonzero(symbols >= 0).tolist()
        by_text = {i: vocabulary.tokens[i] for i in drawable if vocabulary.tokens[i] in texts}
        for data in texts.keys() - by_text.values():
            raise ConfigError(
                f"logit_bias has {data.decode(errors='backslashreplace')!r}, and {name} has no token with exactly "
                "these bytes",
                "a word is often a token with the space in front of it, as ' word', and several tokens otherwise",
            )
        for i, data in by_text.items():
            found[i] = found.get(i, 0.0) + texts[data]
    return LogitBias(np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.float64))
