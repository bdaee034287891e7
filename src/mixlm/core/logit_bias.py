"""Logit biases by text: what is added to the logits of the tokens that have exactly these bytes.

Each member has token ids of its own, so a text stands for a token of each of them; several ids of a member with the
same bytes get the same bias. Token ids are accepted where members share a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mixlm.errors import ConfigError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, LogitBias

LogitBiasOption = Mapping[str | int, float]


def member_logit_bias(
    option: LogitBiasOption,
    vocabulary: Vocabulary,
    symbols: Ids,
    *,
    member: str,
    unit: str,
    shared_vocabulary: bool,
) -> LogitBias | None:
    """Return the bias of one member's tokens, None for an empty option.

    Args:
        option: Bias by a token's text, or by its id where members share a vocabulary.
        vocabulary: The member's vocabulary.
        symbols: The shared symbol of each of the member's ids, int64 (vocab,), -1 for ids that it may not sample.
        member: The member's name, for messages.
        unit: The unit's name, for messages.
        shared_vocabulary: Whether an id is the same token for every member.

    Raises:
        ConfigError: A text is not a token of the member, or an id is not a token that it may sample.
    """
    if not option:
        return None
    by_bytes: dict[bytes, float] = {}
    by_id: dict[int, float] = {}
    for key, value in option.items():
        if isinstance(key, str):
            by_bytes[key.encode(errors="surrogatepass")] = value
            continue
        if not shared_vocabulary:
            raise ConfigError(
                f"logit_bias has the token id {key}, and in the unit {unit} each member has token ids of its own",
                "give the token's text",
            )
        if key >= len(symbols) or symbols[key] < 0:
            raise ConfigError(f"logit_bias has the token id {key}, and {member} has no token of that id to sample")
        by_id[key] = value
    if by_bytes:
        sampled_ids = np.flatnonzero(symbols >= 0).tolist()
        bytes_of = {i: vocabulary.tokens[i] for i in sampled_ids if vocabulary.tokens[i] in by_bytes}
        known = {*bytes_of.values()}
        if (data := next((data for data in by_bytes if data not in known), None)) is not None:
            raise ConfigError(
                f"logit_bias has {data.decode(errors='backslashreplace')!r}, and {member} has no token with exactly "
                "these bytes",
                "a word is often a token with the space in front of it, as ' word', and several tokens otherwise",
            )
        for i, data in bytes_of.items():
            by_id[i] = by_id.get(i, 0.0) + by_bytes[data]
    return LogitBias(np.array(list(by_id), dtype=np.int64), np.array(list(by_id.values()), dtype=np.float64))
