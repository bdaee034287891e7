"""What an ensemble is and what it will cost, before anything is generated."""

from mixlm.inspection.report import Inspection
from mixlm.inspection.run import inspect

__all__ = ["Inspection", "inspect"]
