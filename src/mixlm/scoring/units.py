"""Scores of given text in the units `word` and `byte`: members are asked at every byte, and brought together by law."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixlm.engines.base import Engine
from mixlm.scoring import cache
from mixlm.scoring.passages import Passage
from mixlm.scoring.scores import Scores, joined
from mixlm.scoring.ways import Reading, bytes_logprobs, read, words_logprobs
from mixlm.types import Floats
from mixlm.version import __version__


class Reader(NamedTuple):
    """A member that is to read: its name, its engine, and what tells its model from others; None to keep nothing."""

    name: str
    engine: Engine
    model: str | None


def exact_scores(
    unit: str,
    readers: Sequence[Reader],
    weights: Floats,
    passages: Sequence[Passage],
    progress: Callable[[str, int, int], None] | None = None,
) -> Scores:
    """Score passages by the law of a unit, "word" or "byte". weights: float64 (members,), summing to 1.

    In `byte` a segment is a byte, and the mixture's probability is exact for any weights. In `word` it is a word, and
    two words that a token of some member could lie across are one segment: there `weights` are needed, and those of a
    router are not known (`ways`). progress: called with a member's name, bytes read, bytes. What has been read is kept
    by passage and member, where a member's model is given. Raises UnsupportedError for an engine that does not tell
    every token's probability, PromptTooLongError for a passage that does not fit.
    """
    start = time.perf_counter()
    total = sum(len(one.data) + 1 for one in passages)
    known: dict[tuple[int, int, bytes], tuple[Reading, float]] = {}
    table: list[list[tuple[Reading, float]]] = [[] for _ in passages]
    for i, reader in enumerate(readers):
        done = 0
        for at, passage in enumerate(passages):
            # Members that share a model read alike, unless their templates differ.
            key = (id(reader.engine), at, passage.before[i].tobytes())
            if key not in known:

                def tell(places: int, done: int = done, name: str = reader.name) -> None:
                    if progress is not None:
                        progress(name, done + places, total)

                known[key] = read_kept(reader, passage, i, tell), _prompt_bits(reader, passage, i)
            table[at].append(known[key])
            done += len(passage.data) + 1
            if progress is not None:
                progress(reader.name, done, total)
    names = tuple(one.name for one in readers)
    parts = [_scores(unit, names, weights, passage, row) for passage, row in zip(passages, table, strict=True)]
    out = joined(parts)
    return replace(out, seconds=time.perf_counter() - start)


def _scores(
    unit: str, names: tuple[str, ...], weights: Floats, passage: Passage, row: Sequence[tuple[Reading, float]]
) -> Scores:
    """Return the scores of one passage. row: each member's reading, and bits per byte of the prompt."""
    n, ends = len(passage.data), passage.ends
    if unit == "byte":
        starts = np.arange(n + ends)
        logprobs = np.column_stack([bytes_logprobs(one, end=ends) for one, _ in row])
    else:
        starts, logprobs = words_logprobs([one for one, _ in row], passage.data, weights, end=ends)
    offset = len(passage.prompt)
    return Scores(
        names,
        unit,
        passage.prompt + passage.data,
        starts=starts + offset,
        ends=np.minimum(np.append(starts[1:], n), n) + offset,
        begins=np.zeros(len(starts), dtype=np.int64),
        logprobs=logprobs,
        prompts=np.tile([bits for _, bits in row], (len(starts), 1)),
    )


def read_kept(reader: Reader, passage: Passage, member: int, progress: Callable[[int], None] | None = None) -> Reading:
    """Return what a member says at every place of a passage, as it was kept, or anew. progress: as for `read`."""
    before = passage.before[member]
    if reader.model is None:
        return read(reader.engine, before, passage.data, progress)
    about = [__version__, "every place", reader.engine.name, dict(reader.engine.details), reader.model]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in (before.tobytes(), passage.data):
        digest.update(len(part).to_bytes(8, "little") + part)
    path = cache.folder() / f"{digest.hexdigest()}.npz"
    if (found := cache.get(path, Reading.load)) is not None:
        return found
    reading = read(reader.engine, before, passage.data, progress)
    cache.put(reading, path)
    return reading


def _prompt_bits(reader: Reader, passage: Passage, member: int) -> float:
    if not passage.prompt:
        return 0.0
    return prompt_bits(reader.engine.session().token_logprobs(passage.before[member]), passage.prompt)


def prompt_bits(logprobs: Floats, prompt: bytes) -> float:
    """Return bits per byte of a prompt from the log-probabilities of a member's tokens in front of a text, (n,).

    Of no prompt nothing is said, whatever tokens begin the text.
    """
    return float(-logprobs.sum() / np.log(2) / len(prompt)) if prompt else 0.0
