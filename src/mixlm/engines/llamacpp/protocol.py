"""How llama.cpp, in this process or a server, is asked for the most likely next tokens, and how responses are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mixlm.engines.topk_only import listed_candidates
from mixlm.types import Candidates, Ids

# Added to the logits of ids that count, in float32: so much moves none of them by more than 4e-6, and logits are hardly
# ever so far apart. Where they are, the ids are not among the top ones, and more are requested.
_BIAS = 100.0
FORCING_BIAS = 1000.0  # above any difference of logits


class LlamaCppProtocol:
    """llama.cpp's completions.

    Args:
        letter_token: the id of a token that consists of whole characters.
    """

    def __init__(self, letter_token: int) -> None:
        self._forced = [[letter_token, FORCING_BIAS]]

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for the probabilities among the top N; then for those before llama.cpp's own sampling.

        Where the token that it sampled is part of a character, it withholds the probabilities until the rest comes. The
        second request makes it sample a whole one. Always asking that way would sort the whole vocabulary every time.
        The ids that count become the top ones by an equal bias; that is part of the sampling, so the second request is
        for the top tokens of all.
        """
        common = {"prompt": ids, "n_predict": 1, "temperature": 1.0, "seed": 0, "n_probs": count}
        biases = {} if among is None else {"logit_bias": [[token, _BIAS] for token in among.tolist()]}
        return (
            {**common, "samplers": ["top_k"], "top_k": count, "post_sampling_probs": True, **biases},
            {**common, "logit_bias": self._forced},
        )

    def parse(self, response: Any) -> Candidates | None:
        """Read `top_probs` or `top_logprobs` of the one token."""
        logprobs = response["choices"][0]["logprobs"]
        if logprobs is None:
            return None
        [token] = logprobs["content"]
        if "top_probs" in token:
            return listed_candidates((entry["id"], _log(entry["prob"])) for entry in token["top_probs"])
        return listed_candidates((entry["id"], entry["logprob"]) for entry in token["top_logprobs"])


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
