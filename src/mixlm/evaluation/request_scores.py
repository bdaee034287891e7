"""What members think of a task's given texts, read once: from then on any weights are a matter of milliseconds."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.routing import Router
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.scores import Scores, concatenate, router_weights
from mixlm.types import Floats


@dataclass(frozen=True)
class RequestScores:
    """The scores of many requests. whole: of all of them. owner: the request of each segment, int64 (segments,).

    impossible: requests too long for a member, which have probability 0, bool (requests,).
    """

    whole: Scores
    owner: npt.NDArray[np.int64]
    impossible: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, plain: Sequence[Mapping[str, Any] | None], names: Sequence[str], unit: str) -> RequestScores:
        """Return scores from the JSON form of each request's: empty where there is no text, None where it failed."""
        parts = [(i, scores_from_json(record, names, unit)) for i, record in enumerate(plain) if record]
        owner = np.concatenate([np.full(len(part.ends), i) for i, part in parts])
        return cls(concatenate([part for _, part in parts]), owner, np.array([record is None for record in plain]))

    def logprobs(self, router: Router) -> Floats:
        """Return the natural log-probability of each request's text under a router's mixture: float64 (requests,)."""
        mixed = self.whole.mixture(router_weights(self.whole, router))
        out: Floats = np.bincount(self.owner, weights=mixed, minlength=len(self.impossible)).astype(np.float64)
        out[self.impossible] = -np.inf
        return out


def scores_to_json(scores: Scores | None) -> dict[str, Any]:
    """Return the scores of one passage in a form that JSON holds, names and unit left out; {} for None."""
    if scores is None:
        return {}
    return {
        "text": scores.text.decode(),
        "prompt_bytes": int(scores.starts[0]),
        "ends": scores.ends.tolist(),
        "logprobs": scores.logprobs.tolist(),
        "prompt_bits": scores.prompt_bits[0].tolist(),
        "seconds": scores.seconds,
        **({} if scores.observed is None else {"observed": _observed_to_json(scores.observed)}),
    }


def _observed_to_json(observed: ObservedStates) -> dict[str, Any]:
    hidden = None if observed.hidden is None else b64encode(observed.hidden.tobytes()).decode()
    # JSON has no infinity; tokens that the engine did not report have the id -1.
    logprobs = np.where(observed.ids < 0, 0.0, observed.logprobs)
    return {"name": observed.name, "ids": observed.ids.tolist(), "logprobs": logprobs.tolist(), "hidden": hidden}


def _observed_from_json(raw: Mapping[str, Any]) -> ObservedStates:
    ids = np.array(raw["ids"], dtype=np.int64)
    logprobs = np.where(ids < 0, -np.inf, np.array(raw["logprobs"], dtype=np.float64))
    hidden = None
    if raw["hidden"] is not None:
        hidden = np.frombuffer(b64decode(raw["hidden"]), dtype=np.float16).reshape(len(ids), -1)
    return ObservedStates(raw["name"], ids, logprobs, hidden)


def scores_from_json(raw: Mapping[str, Any], names: Sequence[str], unit: str) -> Scores:
    """Return the scores that `scores_to_json` was given."""
    ends = np.array(raw["ends"], dtype=np.int64)
    starts = np.concatenate([[raw["prompt_bytes"]], ends[:-1]]).astype(np.int64)
    table = np.array(raw["logprobs"], dtype=np.float64)
    prompts = np.tile(np.array(raw["prompt_bits"], dtype=np.float64), (len(ends), 1))
    begins = np.zeros(len(ends), dtype=np.int64)
    observed = _observed_from_json(raw["observed"]) if "observed" in raw else None
    text = raw["text"].encode()
    return Scores(tuple(names), unit, text, starts, ends, begins, table, prompts, raw["seconds"], observed)
