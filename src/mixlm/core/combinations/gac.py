"""`gac`: the average over the union of the members' token strings, of which the most likely is taken.

Source: Yu et al. (Findings of EMNLP 2024, arXiv 2406.12585). Over strings, it is the average; what is special is
which tokens are the same: those that tokenizers spell alike (`alignment`), where other rules pool tokens of equal
bytes. The published choice is temperature 0; temperature and truncation, where given, apply to the average.

Envelope, coin first, source of bounds and cost: those of `mean-then-truncate`, over strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixlm.core.combinations.average import Average
from mixlm.core.combinations.base import Alignment


@dataclass(frozen=True)
class GaC(Average):
    """The average over token strings."""

    name: ClassVar[str] = "gac"
    common_options: ClassVar[bool] = True
    alignment: ClassVar[Alignment] = "strings"
