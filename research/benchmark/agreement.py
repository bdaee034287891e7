"""Members with a set agreement, by construction: to measure what speculation gains at a known acceptance rate.

Forwards run and take their time; then made-up distributions replace their logits. They are functions of the last few
tokens. In a share of all contexts they are the same for all members, so that with the noise of the position a draft is
accepted; in the other contexts members have no token in common, so that it is rejected.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from mixlm.binding import LoadedMember
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.engines.requests import LogitsRequest, Request, Response, SampleRequest, SampleResponse
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Logits, LogitsRow

_ORDER = 3  # tokens that the distribution looks at
_TOKENS = 512  # that can be written
_SCALE = 1.5  # of the logits, normal


class AgreementDistribution:
    """Made-up logits of every member. share: of the contexts in which they are the same for all.

    Raises UnsupportedError when the members have too few tokens in common.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], share: float, seed: int = 0) -> None:
        self.share = check_share(share)
        self._seed = seed
        self._sizes = [vocabulary.size for vocabulary in vocabularies]
        common = range(min(self._sizes))
        shared = [i for i in common if all(vocabulary.tokens[i] for vocabulary in vocabularies)]
        self._ids = np.array(shared[:_TOKENS], dtype=np.int64)
        if self._ids.size < 2 * len(vocabularies):
            raise UnsupportedError(f"the members share {self._ids.size} tokens, too few to disagree in")

    def agrees(self, ids: Ids) -> bool:
        """Whether the members have one distribution after these ids."""
        return bool(self._rng(ids).random() < self.share)

    def __call__(self, member: int, ids: Ids) -> Logits:
        """Return a member's logits after these ids: float32 (vocab,), -inf for what it cannot write."""
        rng = self._rng(ids)
        agrees = rng.random() < self.share
        values = rng.normal(scale=_SCALE, size=self._ids.size)
        out = np.full(self._sizes[member], -np.inf, dtype=np.float32)
        rows = slice(None) if agrees else slice(member, None, len(self._sizes))
        out[self._ids[rows]] = values[rows]
        return out

    def _rng(self, ids: Ids) -> np.random.Generator:
        return np.random.default_rng([self._seed, *ids[-_ORDER:].tolist()])


class AgreementEngine(Engine):
    """An engine whose forwards are another's, and whose answers are a distribution's."""

    def __init__(self, inner: Engine, member: int, distribution: AgreementDistribution) -> None:
        self.inner = inner
        self._member = member
        self._law = distribution
        self.name = inner.name
        self.vocabulary, self.encoder, self.prompts = inner.vocabulary, inner.encoder, inner.prompts
        self.context_length, self.stops, self.device = inner.context_length, inner.stops, inner.device
        self.weights_bytes, self.tokenizer_info = inner.weights_bytes, inner.tokenizer_info
        self.details = {**inner.details, "agreement": agreement_note(distribution.share)}
        self.notes = (*inner.notes, agreement_note(distribution.share))

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """The other engine's: members that share a model share its memory."""
        return self.inner.weight_parts

    def session(self) -> Session:
        """Begin a sequence of the other engine."""
        return self.inner.session()

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Run what is asked, and answer by the distribution."""
        responses = self.inner.respond([(session, self._own(request)) for session, request in requests])
        return [
            self._rows(request) if isinstance(request, LogitsRequest) else response
            for (_, request), response in zip(requests, responses, strict=True)
        ]

    def _own(self, request: Request) -> Request:
        if not isinstance(request, SampleRequest):
            return request

        def choose(_: LogitsRow) -> SampleResponse:
            return request.sample(self._law(self._member, request.ids))

        return SampleRequest(request.member, request.ids, choose, request.top_k_filter)

    def _rows(self, request: LogitsRequest) -> Logits:
        ends = range(len(request.ids) - request.last + 1, len(request.ids) + 1)
        return np.stack([self._law(self._member, request.ids[:end]) for end in ends])


def check_share(share: float) -> float:
    """Return a share. Raises ConfigError for a number that is none."""
    if not 0 <= share <= 1:
        raise ConfigError(f"agreement is {share:g}; it must be from 0 to 1", "0.8 is 80 % of all contexts")
    return share


def agreement_note(share: float) -> str:
    """Say what was set, for everything that shows such numbers."""
    return f"agreement set to {share:.0%} by construction; forward costs are real"


def with_agreement(ensemble: Ensemble, share: float) -> Ensemble:
    """Return the ensemble with members that agree in this share of all contexts. share: 0 to 1.

    Members that share one model are run one by one, as different models would be. Raises ConfigError for no share,
    UnsupportedError for members without a common vocabulary.
    """
    if not ensemble.unit.traits.shared_vocabulary:
        raise UnsupportedError(
            f"agreement by construction needs the unit token, and these members write in {ensemble.unit.name}s",
            "take members that share a vocabulary, such as shape: models",
        )
    distribution = AgreementDistribution([member.engine.vocabulary for member in ensemble.members], share)
    members = [
        LoadedMember(AgreementEngine(member.engine, i, distribution), member.name, member.sampling)
        for i, member in enumerate(ensemble.members)
    ]
    return Ensemble(
        members, ensemble.weights.tolist(), unit="token", router=ensemble.router, defaults=ensemble.defaults
    )
