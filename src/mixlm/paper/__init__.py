"""The tables and figures of the paper (arXiv 2605.00419), run anew: on its models, or on others.

`make` says what an experiment is, `run` runs it, `write` makes JSON, Markdown and figures from what was found.
"""

from mixlm.paper.experiments import NAMES, Experiment, Lineup, lineup, make
from mixlm.paper.findings import Findings, read
from mixlm.paper.output import joined, write
from mixlm.paper.running import run
from mixlm.paper.store import Store

__all__ = ["NAMES", "Experiment", "Findings", "Lineup", "Store", "joined", "lineup", "make", "read", "run", "write"]
