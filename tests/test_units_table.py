"""The bits per byte of docs/units.md are those of the laws of texts: against enumeration, on toys."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from toys import END, engine, ensemble, exact_law, member_law

from mixlm.records import Sampling
from mixlm.vocab.words import begins_word

TOKENS = ((b"a", b"b", b"ab", b" ", b" a", b"ba", b"bab"), (b" a", b"b", b"a", b" ", b" ab", b"bb"))
WEIGHTS = np.array([0.6, 0.4])
PLAIN = {"temperature": 1.0, "top_k": 0}


@pytest.fixture(name="table", scope="module")
def _table() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "units_table.py"
    spec = importlib.util.spec_from_file_location("units_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair():
    return ensemble([engine(one, seed=30 + i) for i, one in enumerate(TOKENS)], WEIGHTS, unit="piece")


def following(those, unit: str, path) -> dict[tuple[bytes, int], float]:
    """The law of the next token and its writer behind a path of such."""
    text = b"".join(data for data, _ in path)
    laws = []
    for one in those.members:
        reply = one.engine.encoder.encode(text).ids if text else []
        laws.append(member_law(one.engine, Sampling(**PLAIN), one.engine.prompts.raw("").tolist(), reply))
    if unit == "piece" or not path:
        return {(u, i): WEIGHTS[i] * p for i, law in enumerate(laws) for u, p in law.items()}
    owner = path[-1][1]
    begun = [{u: p for u, p in law.items() if u == END or begins_word(u, text)} for law in laws]
    out = {(u, owner): p for u, p in laws[owner].items() if u not in begun[owner]}
    ended = sum(begun[owner].values())
    for i, law in enumerate(begun):
        out |= {(u, i): WEIGHTS[i] * ended * p / sum(law.values()) for u, p in law.items()}
    return out


@pytest.mark.parametrize("unit", ["piece", "word"])
@pytest.mark.parametrize("text", [b"ab a", b"a  ab", b"babab a"])
def test_bits_per_byte_are_those_of_all_ways_to_write_a_text(table, text, unit):
    those = pair()

    def go(path) -> float:
        before = b"".join(data for data, _ in path)
        if len(before) >= len(text):
            return 1.0
        after = {step: p for step, p in following(those, unit, path).items() if step[0] != END}
        return sum(
            p * go((*path, step))
            for step, p in after.items()
            if (before + step[0]).startswith(text) or text.startswith(before + step[0])
        )

    assert table.Laws(those, text).bits(WEIGHTS, unit) * len(text) == pytest.approx(-np.log2(go(())))


@pytest.mark.parametrize("text", [b"ab a", b"babab a"])
def test_one_member_has_one_law_of_texts_in_pieces_and_in_bytes(table, text):
    laws = table.Laws(pair(), text)
    for one in np.eye(2):
        assert laws.bits(one, "byte") == pytest.approx(laws.bits(one, "piece"))


def test_a_byte_mixture_averages_the_members_next_bytes(table):
    laws = table.Laws(pair(), b"a")
    law = exact_law(pair(), PLAIN, "")
    assert laws.bits(WEIGHTS, "byte") == pytest.approx(-np.log2(sum(p for u, p in law.items() if u[:1] == b"a")))
