"""What members think of a task's given texts, read once: from then on any weights are a matter of milliseconds."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.routing import Router
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.passages import Passage
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


def scores_to_json(scores: Scores | None) -> dict[str, str]:
    """Return the scores of one passage in a form that JSON holds, names and unit left out; {} for None."""
    if scores is None:
        return {}
    arrays = {name: getattr(scores, name) for name in ("starts", "logprobs")}
    arrays["prompt_bits"] = scores.prompt_bits[0]
    observed = {} if scores.observed is None else {"observed": scores.observed.name}
    if scores.observed is not None:
        arrays |= {f"observed {name}": array for name, array in scores.observed.arrays().items()}
    file = BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return {"text": scores.text.decode(), **observed, "npz": b64encode(file.getvalue()).decode()}


def scores_from_json(raw: Mapping[str, str], names: Sequence[str], unit: str) -> Scores:
    """Return the scores that `scores_to_json` was given."""
    with np.load(BytesIO(b64decode(raw["npz"])), allow_pickle=False) as file:
        arrays = dict(file)
    starts = arrays["starts"]
    text, prompt = raw["text"].encode(), int(starts[0])
    passage = Passage(text[prompt:], [], text[:prompt])
    scores = Scores.of_passage(tuple(names), unit, passage, starts - prompt, arrays["logprobs"], arrays["prompt_bits"])
    if "observed" not in raw:
        return scores
    states = {name.removeprefix("observed "): array for name, array in arrays.items() if name.startswith("observed ")}
    return replace(scores, observed=ObservedStates(raw["observed"], **states))
