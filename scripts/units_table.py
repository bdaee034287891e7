"""What the units are worth: bits per byte of given texts, and the health and speed of texts that are written.

    python scripts/units_table.py [--models A B] [--bytes N] [--prompts N] [--tokens N] [--out FILE.json]

Bits per byte are those of the law of texts, exactly: a sum over every way to write a text, in every unit. That takes a
forward at each byte of it, so the texts are short. Prints the two tables of docs/units.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mixlm
from mixlm.ensemble import Ensemble
from mixlm.records import Completion
from mixlm.vocab.bytes import ByteUnit
from mixlm.vocab.encoding import utf8_runs
from mixlm.vocab.words import begins_word

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "prose": "The ferry left at six, an hour before the fog. On the upper deck an old man was feeding bread to the "
    "gulls, one crumb at a time, and his granddaughter counted them aloud. When she came to thirty she began again, "
    "because nobody had told her what comes next, and the gulls did not seem to mind.",
    "reference": "Structure\n\n" + (ROOT / "docs" / "structure.md").read_text(encoding="utf-8").split("\n\n", 3)[2][3:],
    "code": (ROOT / "src" / "mixlm" / "vocab" / "units.py").read_text(encoding="utf-8").split("class TokenBuffer:")[1],
}
PROMPTS = (
    "Why is the sky blue?",
    "Describe a morning at a harbour.",
    "Write a Python function that reverses a list, and explain it.",
    "Name three rivers and say something about each.",
    "How does one bake bread?",
    "What is a mixture of experts?",
)


class Laws:
    """Each member's law of tokens, without options, at every place of one text.

    For each member and place: the probability of the tokens that the text goes on with, by where they end; that of all
    tokens that reach a place or beyond it; and that of all that begin a word there.
    """

    def __init__(self, ensemble: Ensemble, text: bytes) -> None:
        self._text = text
        engines = [one.engine for one in ensemble.members]
        self._unit = ByteUnit([one.vocabulary for one in engines], [one.encoder for one in engines])
        self._prompts = [np.array(one.prompts.prefix(one.vocabulary.ends), dtype=np.int64) for one in engines]
        self._places = [[*self._read(i, one.session())] for i, one in enumerate(engines)]

    def _read(self, i: int, session: Any) -> Any:
        state = self._unit.begin(self._prompts)
        lexicon = state.lexicons[i]
        firsts = np.array([lexicon.spelled(rank)[0] for rank in range(len(lexicon) - 1)])
        kinds = {
            before: np.isin(firsts, [b for b in range(256) if begins_word(bytes([b]), before)])
            for before in (b"", b"x")
        }
        symbols = self._unit.symbols(i)
        allowed = np.flatnonzero(symbols >= 0)
        for place, byte in enumerate(self._text):
            logits = session.logits(state.ids(i))[0][allowed].astype(np.float64)
            weights = np.exp(logits - logits.max())
            masses = np.bincount(
                lexicon.ranks[symbols[allowed]], weights=weights / weights.sum(), minlength=len(lexicon)
            )
            sums = np.concatenate([[0.0], np.cumsum(masses)])
            exactly = {place + length: float(masses[rank]) for length, rank in lexicon.along(self._text[place:])}
            over = {}
            for stop in range(place + 1, len(self._text) + 1):
                low, high = lexicon.within(self._text[place:stop])
                if low == high:
                    break
                over[stop] = float(sums[high] - sums[low])
            begin = kinds[b"x" if begins_word(b" ", self._text[:place]) else b""]
            yield exactly, over, float(masses[:-1][begin].sum() + masses[-1])
            state.append(byte)

    def bits(self, weights: npt.NDArray[np.float64], unit: str) -> float:
        """Return bits per byte of the text under the law of texts of a unit, and of a mixture of members."""
        if unit == "byte":
            each = [np.diff(self._prefixes(one, words=False)) for one in np.eye(len(weights))]
            return float(-np.log2(weights @ np.exp(each)).mean())
        return float(-self._prefixes(weights, words=unit == "word")[-1] / np.log(2) / len(self._text))

    def _prefixes(self, weights: npt.NDArray[np.float64], *, words: bool) -> npt.NDArray[np.float64]:
        """Return the log-probability that what is written begins with the text up to each place: (bytes + 1,)."""
        n, members = len(self._text), range(len(weights))
        reached = np.zeros((n + 1, len(weights)))  # probability that a symbol ends at a place, by who wrote it
        reached[0] = weights
        covered = np.zeros(n + 1)
        covered[0] = 1
        for place in range(n):
            begins = begins_word(self._text[place : place + 1], self._text[:place])
            for i in members:
                exactly, over, begin = self._places[i][place]
                if not words or place == 0:
                    factor = weights[i] * reached[place].sum()
                elif begins:
                    ended = sum(reached[place, z] * self._places[z][place][2] for z in members)
                    factor = weights[i] * ended / begin
                else:
                    factor = reached[place, i]
                for stop, p in exactly.items():
                    reached[stop, i] += factor * p
                for stop, p in over.items():
                    covered[stop] += factor * p
        return np.log(covered)


def health(ensemble: Ensemble, replies: list[Completion]) -> dict[str, float | None]:
    """Return what can be seen of texts without reading them."""
    encoders = {one.name: one.engine for one in ensemble.members}
    tokens = astray = switches = words = invalid = 0
    for reply in replies:
        data = b"".join(one.data for one in reply.tokens)
        spans = {}
        for name, engine in encoders.items():
            ends = np.cumsum([len(engine.vocabulary.tokens[i]) for i in engine.encoder.encode(data).ids]).tolist()
            spans[name] = set(zip([0, *ends], ends, strict=False))
        invalid += any(text is None for text, _ in utf8_runs(data)[0])
        at = 0
        for before, one in zip([None, *reply.tokens], reply.tokens, strict=False):
            begins = at == 0 or begins_word(one.data, data[:at])
            words += begins
            switches += before is not None and before.member != one.member and not begins
            astray += (at, at + len(one.data)) not in spans[one.member]
            at += len(one.data)
        tokens += len(reply.tokens)
    size = sum(one.usage.bytes for one in replies)
    work = [one for reply in replies for one in reply.usage.members.values()]
    read = sum(len(encoders[name].encoder.encode(reply.text.encode()).ids) * share.tokens / len(reply.tokens)
               for reply in replies for name, share in reply.usage.members.items())  # fmt: skip
    return {
        "bytes": size,
        "not canonical": None if ensemble.unit.name == "byte" else astray / tokens,
        "not UTF-8": invalid / len(replies),
        "switches inside 100 words": 100 * switches / words,
        "forwards / byte": sum(one.forwards for one in work) / size,
        "forwards / token": sum(one.forwards for one in work) / read,
        "bytes/s": size / sum(one.usage.seconds - one.usage.seconds_to_first_token for one in replies),
    }


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma-3-270m"])
    parser.add_argument("--bytes", type=int, default=300, help="of each text; 0 leaves out the first table")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=100, help="of each reply; five bytes are taken for one")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pair = mixlm.load(*given.models)
    equal = np.full(len(pair.members), 1 / len(pair.members))
    found: dict[str, Any] = {"arguments": {name: str(one) for name, one in vars(given).items()}}
    rows = [(name, one, "byte") for name, one in zip(pair.names, np.eye(len(equal)), strict=True)]
    rows += [(unit, equal, unit) for unit in ("piece", "word", "byte")]
    if given.bytes:
        laws = {name: Laws(pair, text.encode()[: given.bytes]) for name, text in TEXTS.items()}
        bits = {label: {name: one.bits(w, unit) for name, one in laws.items()} for label, w, unit in rows}
        found["bits per byte"] = bits
        show(
            ["bits per byte", *TEXTS], [[label, *(f"{one:.3f}" for one in row.values())] for label, row in bits.items()]
        )
    written: dict[str, Any] = {}
    for label, weights, unit in rows if given.prompts else []:
        alone = weights.max() == 1
        those = Ensemble(pair.members, weights.tolist(), unit="piece" if alone else unit)  # type: ignore[arg-type]
        for name, kind in [(label, those)] + (
            [(f"{label} (byte)", Ensemble(pair.members, weights.tolist(), unit="byte"))] if alone else []
        ):
            most = given.tokens * (5 if kind.unit.name == "byte" else 1)
            replies = [
                kind.generate(one, seed=1, sequence=i, max_tokens=most, ignore_end=True)
                for i, one in enumerate(PROMPTS[: given.prompts])
            ]
            written[name] = {**health(kind, replies), "replies": [one.text for one in replies]}
            print(name, {key: one for key, one in written[name].items() if key != "replies"}, flush=True)
    found["written"] = written
    if given.out:
        given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if written:
        heads = [one for one in next(iter(written.values())) if one != "replies"]
        show(["", *heads], [[label, *(number(row[one]) for one in heads)] for label, row in written.items()])


def number(value: float | None) -> str:
    """Return a figure as it is printed."""
    return "" if value is None else f"{value:.3g}"


def show(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table as Markdown."""
    print("\n".join(f"| {' | '.join(one)} |" for one in [heads, ["---"] * len(heads), *rows]), flush=True)


if __name__ == "__main__":
    main()
