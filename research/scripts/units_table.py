"""What the units are worth: bits per byte of given texts, and the health and speed of texts that are written.

    python -m research.scripts.units_table [--models A B] [--texts NAME=FILE ...] [--bytes N] [--prompts N] [--tokens N]

Bits per byte are those of the distribution over texts, exactly: a sum over every way to write a text, in every unit
(`mixlm.scoring.marginals`). That takes a forward at each byte of it; what was read is kept in the cache folder, so that
a run that was stopped goes on where it was. Prints the two tables of docs/units.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mixlm
from mixlm.ensemble import Ensemble
from mixlm.scoring.marginals import TokenMatches, byte_logprobs, cached_matches, piece_logprobs, word_logprobs
from mixlm.scoring.passages import text_prefix
from mixlm.scoring.score import identity
from mixlm.tokenization.incremental import utf8_runs
from mixlm.types import Completion
from mixlm.units.word import begins_word

PROMPTS = (
    "Why is the sky blue?",
    "Describe a morning at a harbour.",
    "Write a Python function that reverses a list, and explain it.",
    "Name three rivers and say something about each.",
    "How does one bake bread?",
    "What is a mixture of experts?",
)


def bits(readings: Sequence[TokenMatches], data: bytes, weights: npt.NDArray[np.float64], unit: str) -> float:
    """Return bits per byte of a text under the distribution over texts of a unit, and of a mixture of members."""
    if unit == "byte":
        logprobs = np.logaddexp.reduce(np.log(weights)[:, None] + [byte_logprobs(reading) for reading in readings])
    elif unit == "word":
        logprobs = np.logaddexp.reduce(np.log(weights) + word_logprobs(readings, data, weights)[1], axis=1)
    else:
        logprobs = piece_logprobs(readings, weights)
    return float(-logprobs.sum() / np.log(2) / len(data))


def texts(arguments: Sequence[str], size: int) -> dict[str, bytes]:
    """Return `size` bytes from the middle of each file of NAME=FILE, from the first line end there."""
    out = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        data = Path(path).read_bytes()
        start = data.find(b"\n", max((len(data) - size) // 2, 0)) + 1
        out[name] = data[start : start + size].decode(errors="ignore").encode()
    return out


def likelihood(ensemble: Ensemble, models: Sequence[str], data: bytes) -> dict[str, float]:
    """Return bits per byte of one text: of each member, and of equal weights in each unit. What was read is kept."""
    readings = [
        cached_matches(member.engine, text_prefix(member.engine), data, identity(model))
        for member, model in zip(ensemble.members, models, strict=True)
    ]
    equal = np.full(len(readings), 1 / len(readings))
    alone = {
        member.name: bits([mine], data, np.ones(1), "byte")
        for member, mine in zip(ensemble.members, readings, strict=True)
    }
    return alone | {unit: bits(readings, data, equal, unit) for unit in ("piece", "word", "byte")}


def health(ensemble: Ensemble, completions: list[Completion]) -> dict[str, float | None]:
    """Return what can be seen of texts without reading them."""
    encoders = {member.name: member.engine for member in ensemble.members}
    tokens = astray = switches = words = invalid = 0
    for completion in completions:
        data = b"".join(token.data for token in completion.tokens)
        spans = {}
        for name, engine in encoders.items():
            ends = np.cumsum([len(engine.vocabulary.tokens[i]) for i in engine.encoder.encode(data).ids]).tolist()
            spans[name] = set(zip([0, *ends], ends, strict=False))
        invalid += any(text is None for text, _ in utf8_runs(data)[0])
        start = 0
        for before, token in zip([None, *completion.tokens], completion.tokens, strict=False):
            begins = start == 0 or begins_word(token.data, data[:start])
            words += begins
            switches += before is not None and before.member != token.member and not begins
            astray += (start, start + len(token.data)) not in spans[token.member]
            start += len(token.data)
        tokens += len(completion.tokens)
    size = sum(completion.usage.bytes for completion in completions)
    work = [member for completion in completions for member in completion.usage.members.values()]
    read = sum(len(encoders[name].encoder.encode(completion.text.encode()).ids) * share.tokens / len(completion.tokens)
               for completion in completions for name, share in completion.usage.members.items())  # fmt: skip
    return {
        "bytes": size,
        "not canonical": None if ensemble.unit.name == "byte" else astray / tokens,
        "not UTF-8": invalid / len(completions),
        "switches inside 100 words": 100 * switches / words,
        "forwards / byte": sum(member.forwards for member in work) / size,
        "forwards / token": sum(member.forwards for member in work) / read,
        "bytes/s": size
        / sum(completion.usage.seconds - completion.usage.seconds_to_first_token for completion in completions),
    }


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma-3-270m"])
    parser.add_argument("--texts", nargs="*", default=[], metavar="NAME=FILE", help="leave out for no first table")
    parser.add_argument("--bytes", type=int, default=4000, help="of each text, from its middle")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=100, help="of each completion; five bytes are taken for one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pair = mixlm.load(*arguments.models)
    equal = np.full(len(pair.members), 1 / len(pair.members))
    results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(arguments).items()}}
    rows = [(name, row_weights, "byte") for name, row_weights in zip(pair.names, np.eye(len(equal)), strict=True)]
    rows += [(unit, equal, unit) for unit in ("piece", "word", "byte")]
    if arguments.texts:
        columns = {}
        for name, data in texts(arguments.texts, arguments.bytes).items():
            columns[name] = likelihood(pair, arguments.models, data)
            print(name, len(data), columns[name], flush=True)
        results["bits per byte"] = columns
        labels = next(iter(columns.values()))
        show(
            ["bits per byte", *columns],
            [[label, *(f"{column[label]:.3f}" for column in columns.values())] for label in labels],
        )
    written: dict[str, Any] = {}
    for label, weights, unit in rows if arguments.prompts else []:
        alone = weights.max() == 1
        ensemble = Ensemble(pair.members, weights.tolist(), unit="piece" if alone else unit)  # type: ignore[arg-type]
        for name, kind in [(label, ensemble)] + (
            [(f"{label} (byte)", Ensemble(pair.members, weights.tolist(), unit="byte"))] if alone else []
        ):
            limit = arguments.tokens * (5 if kind.unit.name == "byte" else 1)
            completions = [
                kind.generate(prompt, seed=1, sequence=i, max_tokens=limit, ignore_end=True)
                for i, prompt in enumerate(PROMPTS[: arguments.prompts])
            ]
            written[name] = {**health(kind, completions), "replies": [completion.text for completion in completions]}
            print(name, {key: value for key, value in written[name].items() if key != "replies"}, flush=True)
    results["written"] = written
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if written:
        heads = [key for key in next(iter(written.values())) if key != "replies"]
        show(["", *heads], [[label, *(number(row[head]) for head in heads)] for label, row in written.items()])


def number(value: float | None) -> str:
    """Return a figure as it is printed."""
    return "" if value is None else f"{value:.3g}"


def show(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table as Markdown."""
    print("\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]), flush=True)


if __name__ == "__main__":
    main()
