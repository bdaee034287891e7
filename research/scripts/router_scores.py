"""Scores for `router_study`: one member in memory at a time, and texts held out that share nothing with the others."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import mixlm
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.fitting.gates import choose_inputs, untrained
from mixlm.scoring.passages import Passage, split_passages, text_prefix
from mixlm.scoring.score import identity, join_members, score_answers, score_passages
from mixlm.scoring.scores import Scores, concatenate
from mixlm.tokenization.segments import encode_exactly
from research.scripts.router_cost import forward_seconds
from research.scripts.router_features import Kinds, token_kinds

Job = Callable[[Ensemble, Sequence[str | None]], Scores]  # scores an ensemble of one member
_TOGETHER = 8  # passages, or 5 times as many answers, that are scored and cached at once
_STRETCH = 64  # bytes in a row that two texts do not share by chance
_SHORTEST = 200  # bytes of a passage
_SHARED = 0.1  # of a passage that may occur in the other part
_MEGABYTES = "4000"  # of the cache of scores, which holds hidden states too


@dataclass(frozen=True)
class Members:
    """What is known of the members.

    Attributes:
        names: Their names.
        sizes: Bytes of their weights.
        seconds: Of a forward of one token.
        observed: The one that gates observe.
        kinds: Its tokens' (`token_kinds`).
        hidden: Numbers in its hidden state.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    observed: int
    kinds: Kinds
    hidden: int


def score_by_member(
    models: Sequence[str], engine: str | None, observe: str | None, jobs: Mapping[str, Job], *, states: bool = True
) -> tuple[Members, dict[str, Scores]]:
    """Score jobs under each member, loaded one after the other, and what a gate observes of one of them.

    Args:
        models: The members'.
        engine: Of all of them.
        observe: The observed member's name, or its model; by default the one with the smallest weights.
        jobs: By name.
        states: Whether the observed member runs once more for what gates observe.

    Returns:
        The members, and the scores of each job, in which they are brought together.
    """
    os.environ.setdefault("MIXLM_SCORES_MB", _MEGABYTES)
    names: list[str] = []
    sizes: list[int] = []
    seconds: list[float] = []
    parts: dict[str, list[Scores]] = {name: [] for name in jobs}
    for model in models:
        ensemble = mixlm.load(model, engine=engine)
        name = ensemble.names[0]
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
        sizes.append(ensemble.members[0].engine.weights_bytes)
        seconds.append(forward_seconds(ensemble.members[0].engine))
        for text, job in jobs.items():
            print(f"{text}: scoring by {names[-1]}", flush=True)
            parts[text].append(job(ensemble, [identity(model)]))
        del ensemble
        gc.collect()
    if observe is not None and observe not in (*names, *models):
        raise ConfigError(f"{observe!r} is not a member", f"the members are {', '.join(names)}")
    chosen = names.index(observe) if observe in names else models.index(observe) if observe else int(np.argmin(sizes))
    ensemble = mixlm.load(models[chosen], engine=engine)
    watching = ensemble.with_router(untrained(ensemble.names, choose_inputs(ensemble, ("top_k", "hidden"))))
    for text, job in jobs.items() if states else ():
        print(f"{text}: observing {names[chosen]}", flush=True)
        observed = job(watching, [identity(models[chosen])])
        assert observed.observed is not None
        parts[text][chosen] = replace(observed, observed=replace(observed.observed, name=names[chosen]))
    kinds = token_kinds(ensemble.members[0].engine.vocabulary.tokens)
    joined = {text: join_members(names, own, shared_vocabulary=True) for text, own in parts.items()}
    hidden = ensemble.members[0].engine.hidden_size or 0
    return Members(tuple(names), tuple(sizes), tuple(seconds), chosen, kinds, hidden), joined


def passages_job(passages: Sequence[bytes]) -> Job:
    """Return the job that scores passages, some of them at a time."""

    def job(ensemble: Ensemble, models: Sequence[str | None]) -> Scores:
        engine = ensemble.members[0].engine
        parts = []
        for first in range(0, len(passages), _TOGETHER):
            part = [Passage(data, [text_prefix(engine)]) for data in passages[first : first + _TOGETHER]]
            parts.append(score_passages(ensemble, part, identities=models))
            print(f"  {min(first + _TOGETHER, len(passages))} of {len(passages)} passages", flush=True)
        return concatenate(parts)

    return job


def answers_job(pairs: Sequence[tuple[str, str]]) -> Job:
    """Return the job that scores answers after their prompts, some of them at a time."""

    def job(ensemble: Ensemble, models: Sequence[str | None]) -> Scores:
        settings, parts, together = ensemble.settings(raw=True), [], 10 * _TOGETHER
        for first in range(0, len(pairs), together):
            part = pairs[first : first + together]
            parts.append(score_answers(ensemble, part, settings=settings, ends=False, identities=models))
            print(f"  {min(first + together, len(pairs))} of {len(pairs)} answers", flush=True)
        return concatenate(parts)

    return job


def split_text(path: Path, train: int, check: int) -> tuple[list[bytes], list[bytes]]:
    """Return passages to train on and passages held out, of at most so many bytes each.

    Of a folder, whole files are held out: its files, shuffled, at most an eighth of a part from each. Of one file, its
    first bytes train and its last ones are held out, each up to a blank line.
    """
    if path.is_dir():
        files = [file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()]
        order = np.random.default_rng(0).permutation(len(files))
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for number in order:
            # The part that has the smaller share of its bytes takes the next file.
            fill = [sum(map(len, part)) / size for part, size in zip(parts, (train, check), strict=True)]
            smaller = int(np.argmin(fill))
            if fill[smaller] < 1:
                size = (train, check)[smaller]
                rest = size - sum(map(len, parts[smaller]))
                parts[smaller].append(_whole_lines(files[number][: min(size // 8, rest)]))
    else:
        data = path.read_bytes()
        if len(data) < train + check:
            raise SystemExit(f"{path} has {len(data)} bytes, fewer than {train} and {check}")
        first, last = data[:train], data[len(data) - check :]
        blank = last.find(b"\n\n")
        parts = ([_whole_lines(first)], [last[blank + 2 :] if 0 <= blank < check // 4 else last])
    passages, held = ([_clean(passage) for data in part for passage in split_passages(data)] for part in parts)
    return [data for data in passages if len(data) >= _SHORTEST], [data for data in held if len(data) >= _SHORTEST]


def _whole_lines(data: bytes) -> bytes:
    """Return data up to its last blank line, or else line, where that lies in its last quarter."""
    for end in (b"\n\n", b"\n"):
        cut = data.rfind(end)
        if cut >= len(data) * 3 // 4:
            return data[: cut + 1]
    return data


def _clean(data: bytes) -> bytes:
    return data.decode(errors="ignore").encode()


def without_shared(train: Sequence[bytes], check: Sequence[bytes]) -> tuple[list[bytes], int]:
    """Return the passages held out of which less than a tenth occurs in the training text, and how many were left out.

    That is text in stretches of 64 bytes, as in a licence that is repeated in every file.
    """
    stretches = {data[start : start + _STRETCH] for data in train for start in range(len(data) - _STRETCH + 1)}

    def shared(data: bytes) -> float:
        places = range(max(len(data) - _STRETCH + 1, 0))
        return sum(data[start : start + _STRETCH] in stretches for start in places) / max(len(places), 1)

    kept = [data for data in check if shared(data) < _SHARED]
    return kept, len(check) - len(kept)


def readable(models: Sequence[str], engine: str | None, texts: Mapping[str, list[bytes]]) -> dict[str, list[bool]]:
    """Return which texts the tokens of every member spell, and fit its context."""
    kept = {name: [True] * len(parts) for name, parts in texts.items()}
    for model in models:
        ensemble = mixlm.load(model, engine=engine)
        for name, parts in texts.items():
            own = [_reads(ensemble.members[0].engine, data) for data in parts]
            kept[name] = [before and now for before, now in zip(kept[name], own, strict=True)]
            if not all(own):
                print(f"{name}: {own.count(False)} parts left out that {ensemble.names[0]} cannot read", flush=True)
        del ensemble
        gc.collect()
    return kept


def _reads(engine: Engine, data: bytes) -> bool:
    try:
        ids, _ = encode_exactly(engine.encoder, engine.vocabulary, data, engine.name)
    except ConfigError:
        return False
    return len(ids) + len(text_prefix(engine)) <= engine.context_length


def describe(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the bytes and the passages of each text."""
    return {name: [part.size, part.passages] for name, part in scores.items()}
