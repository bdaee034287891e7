"""What an ensemble is and what it will cost, before anything is generated."""

from mixlm.inspection.run import Inspection, inspect

__all__ = ["Inspection", "inspect"]
