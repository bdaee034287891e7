"""Evaluation on tasks of lm-evaluation-harness: every method, several seeds, differences with their uncertainty.

`EnsembleLM` in `mixlm.evaluation.lm` is the model that the harness sees; importing it needs lm-eval (`mixlm[eval]`),
importing this package does not.
"""

from mixlm.evaluation.results import PairedComparison, Results, Score
from mixlm.evaluation.run import EvaluationOptions, evaluate

__all__ = ["EvaluationOptions", "PairedComparison", "Results", "Score", "evaluate"]
