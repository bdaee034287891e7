"""Speed, measured: every method in one run, interleaved, medians over repeats."""

from mixlm.benchmark.measure import BenchPlan, bench
from mixlm.benchmark.report import BenchReport, MethodRun

__all__ = ["BenchPlan", "BenchReport", "MethodRun", "bench"]
