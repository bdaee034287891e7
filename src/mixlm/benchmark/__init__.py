"""Speed, measured: every method in one run, interleaved, medians over repeats."""

from mixlm.benchmark.measure import bench
from mixlm.benchmark.report import BenchReport, Run

__all__ = ["BenchReport", "Run", "bench"]
