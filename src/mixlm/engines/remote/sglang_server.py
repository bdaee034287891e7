"""A server of SGLang: its own `/generate`, since its `/v1/completions` spells the most likely tokens as text.

Fields are those of version 0.5.23 of October 2026; 0.4.6, 0.5.3 and 0.5.6 have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mixlm.engines.remote.server import ModelServer, log_probability, token_scores
from mixlm.engines.topk_only import TokenScores, listed_candidates
from mixlm.types import Candidates, Ids


class SGLangServer(ModelServer):
    """A model on a server of SGLang, or a LoRA adapter there."""

    name = "SGLang"
    path = "/generate"

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for one token with the top N, or with given ids.

        It returns the log-probabilities of the logits divided by the temperature, before any truncation, so at
        temperature 1 they are the model's own. All that could change them is set: a server may have other defaults.
        """
        sampling = {
            "max_new_tokens": 1,
            "min_new_tokens": 0,
            "ignore_eos": True,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling}
        body |= {"return_logprob": True, "logprob_start_len": -1}
        body |= {"top_logprobs_num": count} if among is None else {"token_ids_logprob": among.tolist()}
        return (body | {"lora_path": self.info.adapter} if self.info.adapter else body,)

    def parse(self, response: Any) -> Candidates | None:
        """Read the log-probability, id and text of each of the top tokens, or of the given ids."""
        reported = response["meta_info"]
        positions = reported.get("output_token_ids_logprobs") or reported.get("output_top_logprobs")
        if positions is None:
            return None
        [top] = positions
        return listed_candidates((token, log_probability(logprob)) for logprob, token, _ in top)

    async def find_missing(self) -> str:
        """Say what every such server lacks."""
        return (
            "it takes seeds with --enable-deterministic-inference only, and returns log-probabilities from before "
            "top-k, top-p and min-p"
        )

    def score_requests(self, ids: list[int]) -> Sequence[tuple[dict[str, Any], Callable[[Any], TokenScores]]]:
        """Ask for `input_token_logprobs`."""
        [body] = self.request_bodies(ids, 1)
        return (({**body, "logprob_start_len": 0}, partial(_parse_scores, ids)),)


def _parse_scores(ids: list[int], response: Any) -> TokenScores:
    """Read `input_token_logprobs`: for each token, log-probability, id and text."""
    meta = response["meta_info"]
    rows, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
    if len(rows) != len(ids) or [row[1] for row in rows] != ids:
        raise ValueError("they are of other tokens")
    logprobs = [log_probability(row[0]) for row in rows[1:]]
    is_top = [logprob >= top[0][0] for logprob, top in zip(logprobs, tops[1:], strict=True)]
    return token_scores(logprobs, is_top)
