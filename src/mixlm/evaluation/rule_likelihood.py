"""The probability of a given continuation under a combination rule, by `mixlm.scoring.rule_scores`.

Contexts and continuations are encoded as for the mixture (`likelihood`). In the unit `piece` it is the sum over all
ways to spell the continuation. Members are scored as they are, without sampling options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlm.core.options import RULE_OPTIONS, GenerationOptions
from mixlm.ensemble import Ensemble
from mixlm.evaluation.contexts import RequestContext
from mixlm.evaluation.likelihood import MemberContinuation, context_text, split_context
from mixlm.scoring.passages import Passage
from mixlm.scoring.rule_scores import RuleScorer, text_passages


def rule_settings(ensemble: Ensemble, options: Mapping[str, Any]) -> GenerationOptions:
    """Return the default options of an ensemble with the rule of some options over theirs, whatever the method."""
    given = {name: options[name] for name in RULE_OPTIONS if name in options}
    return ensemble.defaults.with_options({"method": "conventional", "draft": None, **given})


class RuleContinuationScorer:
    """Scores continuations under the rule of some options.

    Raises:
        UnsupportedError: The rule, the unit or an engine gives no log-probabilities.
    """

    def __init__(self, ensemble: Ensemble, settings: GenerationOptions) -> None:
        self._ensemble = Ensemble(
            ensemble.members, ensemble.weights.tolist(), unit=ensemble.unit, router=ensemble.router, defaults=settings
        )
        self._scorer = RuleScorer(self._ensemble)

    def continuation(self, context: RequestContext, text: str) -> tuple[float, bool]:
        """Return the natural log-probability of `text` behind a context, and whether it is the greedy continuation.

        A context that is too long for a member loses its beginning. Raises PromptTooLongError when the continuation
        alone is too long.
        """
        context, data = split_context(context, text)
        if not data:
            return 0.0, True
        parts = [MemberContinuation(member.engine, context, data) for member in self._ensemble.members]
        passage = Passage(data, [part.before for part in parts], context_text(context))
        [logprob], [greedy] = self._scorer.score(passage)
        return float(logprob), bool(greedy)

    def text(self, text: str) -> float:
        """Return the natural log-probability of a text from its beginning, in passages that fit the contexts."""
        return float(self._scorer.logprobs(text_passages(self._ensemble, [text]))[0]) if text else 0.0
