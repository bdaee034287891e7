from __future__ import annotations

import pytest
from toys import SHARED, VOCABULARIES, engine

from mixlm.choices import UNITS
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.units import build_unit, unit_traits

DIFFERENT = [engine(VOCABULARIES[0]), engine(VOCABULARIES[2])]
EQUAL = [engine(SHARED), engine(SHARED)]


def built(name, engines):
    return build_unit(name, [model.vocabulary for model in engines], [model.encoder for model in engines])


@pytest.mark.parametrize("name", UNITS[1:])
def test_every_unit_is_built_by_its_name(name):
    unit = built(name, EQUAL)
    assert (unit.name, unit.traits) == (name, unit_traits(name))
    assert {"mixture", "single"} <= set(unit.traits.methods)
    symbols = unit.without_owner(unit.symbols(0))
    assert symbols.tolist() == unit.without_owner(unit.symbols(1)).tolist()


def test_auto_is_tokens_for_members_that_share_a_vocabulary_and_pieces_for_others():
    assert built("auto", EQUAL).name == "token"
    assert built("auto", DIFFERENT).name == "piece"


def test_what_cannot_be_built_is_refused():
    with pytest.raises(UnsupportedError, match="these members share no vocabulary"):
        built("token", DIFFERENT)
    with pytest.raises(ConfigError, match="unit is 'wrod'") as refusal:
        built("wrod", EQUAL)
    assert "word" in str(refusal.value.hint)
