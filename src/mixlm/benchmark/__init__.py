"""Speed, measured: every method in one run, interleaved, medians over repeats."""

from mixlm.benchmark.measure import Plan, bench
from mixlm.benchmark.report import BenchReport, Run

__all__ = ["BenchReport", "Plan", "Run", "bench"]
