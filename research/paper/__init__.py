"""The tables and figures of the paper (arXiv 2605.00419), run anew: on its models, or on others.

`make` says what an experiment is, `run` runs it, `write` makes JSON, Markdown and figures from what was found.
"""

from research.paper.experiments import NAMES, Experiment, Lineup, lineup, make
from research.paper.findings import Findings, read
from research.paper.output import joined, write
from research.paper.running import run
from research.paper.store import ResultStore

__all__ = [
    "NAMES",
    "Experiment",
    "Findings",
    "Lineup",
    "ResultStore",
    "joined",
    "lineup",
    "make",
    "read",
    "run",
    "write",
]
