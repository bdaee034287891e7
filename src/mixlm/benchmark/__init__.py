"""Speed, measured: every method in one run, interleaved, medians over repeats; and speed along an axis."""

from mixlm.benchmark.measure import Plan, bench
from mixlm.benchmark.report import BenchReport, Run
from mixlm.benchmark.sweeps import Sweep, sweep_along

__all__ = ["BenchReport", "Plan", "Run", "Sweep", "bench", "sweep_along"]
