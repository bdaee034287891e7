"""Benchmarks behind docs/performance.md: sweeps, transformers beside mixlm, members with a set agreement."""

from research.benchmark.compare import ComparisonPlan, compare
from research.benchmark.sweeps import Sweep, sweep_along

__all__ = ["ComparisonPlan", "Sweep", "compare", "sweep_along"]
