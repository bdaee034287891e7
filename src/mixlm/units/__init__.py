"""What members share a distribution over: tokens, pieces, words or bytes.

The unit NAME is `NameUnit` in `mixlm.units.NAME`, which is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from mixlm.choices import UNITS, UnitName
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.units.base import Unit, UnitTraits
from mixlm.units.token import TokenUnit, vocabulary_conflict


def unit_traits(name: str) -> UnitTraits:
    """Return what the unit of a name can do."""
    traits: UnitTraits = _unit_class(name).traits
    return traits


def build_unit(name: UnitName, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder]) -> Unit:
    """Return a unit for members with these vocabularies and encoders.

    "auto" is `token` for members that share a vocabulary, and `piece` for others.

    Raises:
        ConfigError: There is no unit of this name.
        UnsupportedError: `token` for members that share no vocabulary.
    """
    if name not in UNITS:
        raise ConfigError(f"unit is {name!r}; it must be one of {', '.join(UNITS)}", did_you_mean(str(name), UNITS))
    if name in ("auto", "token"):
        conflict = vocabulary_conflict(vocabularies)
        if conflict is None:
            return TokenUnit(vocabularies)
        if name == "token":
            raise UnsupportedError(f"these members share no vocabulary: {conflict}", "use --unit piece")
    unit: Unit = _unit_class("piece" if name == "auto" else name)(vocabularies, encoders)
    return unit


def _unit_class(name: str) -> Any:
    return getattr(import_module(f"mixlm.units.{name}"), f"{name.capitalize()}Unit")
