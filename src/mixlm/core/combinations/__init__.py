"""Combination rules: one distribution from those of several members. `base` says what a rule is; a rule has a file."""

from mixlm.core.combinations.base import Aligned, Combination, Unreported, align
from mixlm.core.combinations.registry import COMBINATIONS, combination, combination_class

__all__ = ["COMBINATIONS", "Aligned", "Combination", "Unreported", "align", "combination", "combination_class"]
