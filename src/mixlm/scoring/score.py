"""Log-probability of given text: under each member, and under their mixture.

Members with one vocabulary meet at every token, and the mixture's probability is exact: `Σ_i λ_i p_i(t | before)`.
Members with different vocabularies meet where all of them have a token boundary. Between two such places lies a
segment; its probability under the mixture is `Σ_i λ_i P_i(segment | before)`, the law of one coin a segment. That is
not the law of `piece`, whose probability of a text is a sum over all ways to write it; it is what the members'
complementarity can be read from with one forward pass a member. In the units `word` and `byte` the probability is that
of the unit's own law, exactly, which takes a forward at each byte (`ways`, `unit_scores`).

Members are scored as they are, without sampling options: what is measured is the models, not a way to draw from them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixlm.core.options import GenerationOptions
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble, MemberSpec, Prompt
from mixlm.errors import ConfigError
from mixlm.models import resolve
from mixlm.scoring import cache
from mixlm.scoring.passages import PASSAGE_BYTES, Passage, beginning, fitting_contexts, split_passages
from mixlm.scoring.scores import Scores, joined
from mixlm.scoring.units import Reader, exact_scores, prompt_bits
from mixlm.types import Ids, Logits
from mixlm.version import __version__

__all__ = ["Scores", "identity", "score", "score_answers", "split_passages"]

Progress = Callable[[str, int, int], None]


def score(
    ensemble: Ensemble,
    text: str | bytes,
    *,
    progress: Progress | None = None,
    identities: Sequence[str] | None = None,
    by_segment: bool = False,
) -> Scores:
    """Score a text under every member of an ensemble, one pass a member; in the units `word` and `byte`, byte by byte.

    by_segment: members meet where all have a token boundary, whatever the unit. progress: called with the
    member's name, passages read, passages (bytes in those units). identities: what `identity` says of each member's
    model; with them, scores are kept in the cache folder and the same text is not read again. Raises ConfigError for an
    empty text, and for one that a member's tokens do not spell exactly.
    """
    data = text.encode(errors="replace") if isinstance(text, str) else text
    if not data:
        raise ConfigError("the text to score is empty")
    before = [beginning(one.engine) for one in ensemble.members]
    engines = [one.engine for one in ensemble.members]
    passages = [
        Passage(part, before)
        for whole in split_passages(data)
        for part in fitting_contexts(whole, engines, [len(ids) for ids in before])
    ]
    return _scored(ensemble, passages, progress, identities, by_segment=by_segment)


def score_answers(
    ensemble: Ensemble,
    pairs: Sequence[tuple[Prompt, str]],
    *,
    settings: GenerationOptions | None = None,
    ends: bool | None = None,
    progress: Progress | None = None,
    identities: Sequence[str] | None = None,
) -> Scores:
    """Score answers, each behind its prompt as each member's own template writes it.

    An answer is taken as it stands, as a reply would be: a space in front of it counts. settings: of replies, for a
    system message. ends: whether the end of each answer is scored too, a segment of no bytes whose probability is all
    that a member gives to its ends of text. Left out, it is where every member ends its replies itself; a member that
    relies on stop strings, as a base model in a plain template does, would be charged for an end it never writes.
    progress, identities: as for `score`.
    """
    if not pairs:
        raise ConfigError("there are no answers to score")
    settings = settings or ensemble.settings()
    if ends is None:
        ends = not any(one.engine.stops for one in ensemble.members)
    passages = []
    for number, (prompt, answer) in enumerate(pairs, start=1):
        if not answer:
            raise ConfigError(f"answer {number} of {len(pairs)} is empty")
        prompts = ensemble.encode_prompt(prompt, settings)
        passages.append(Passage(answer.encode(errors="replace"), prompts.ids, prompts.text, ends))
    return _scored(ensemble, passages, progress, identities)


def identity(model: str, dtype: str = "auto", adapter: str | None = None) -> str:
    """Return what tells a model from others: where it and its adapter lie, and the sizes and times of their files."""
    if model.startswith("toy:"):
        return model
    found = [resolve(model, "float32" if dtype == "float32" else "bfloat16").path_or_id]
    if adapter is not None:
        found.append(adapter)
    return json.dumps([part for one in found for part in (one, _stamps(Path(one)))])


def _stamps(folder: Path) -> list[list[str | int]]:
    files = sorted(one for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []
    return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]


def _scored(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    progress: Progress | None,
    identities: Sequence[str] | None,
    *,
    by_segment: bool = False,
) -> Scores:
    """Let every member read the passages, and bring their tokens together."""
    if ensemble.unit.name in ("word", "byte") and not by_segment:
        models: Sequence[str | None] = identities or [None] * len(ensemble.members)
        readers = [Reader(one.name, one.engine, model) for one, model in zip(ensemble.members, models, strict=True)]
        return exact_scores(ensemble.unit.name, readers, ensemble.weights, passages, progress)
    known: dict[tuple[int, bytes], Scores] = {}
    parts: list[Scores] = []
    for i, spec in enumerate(ensemble.members):
        # Members that share a model read alike, unless their templates differ.
        key = (id(spec.engine), b"".join(passage.before[i].tobytes() for passage in passages))
        if key not in known:
            known[key] = _read(spec, passages, i, progress, identities[i] if identities else None)
        parts.append(known[key])
    # The end of an answer lies where its last token ends, and is a place of its own behind it.
    places = [2 * one.ends + (one.starts == one.ends) for one in parts]
    common = reduce(np.intersect1d, places)
    columns, firsts = [], []
    for one, mine in zip(parts, places, strict=True):
        last = np.searchsorted(mine, common)
        firsts.append(np.concatenate([[0], last[:-1] + 1]))
        columns.append(np.add.reduceat(one.logprobs[:, 0], firsts[-1]))
    exact = ensemble.unit.name == "token" and all(len(one.ends) == len(common) for one in parts)
    first = parts[0]
    return Scores(
        ensemble.names,
        "token" if exact else "segment",
        first.text,
        starts=first.starts[firsts[0]],
        ends=common // 2,
        begins=first.begins[firsts[0]],
        logprobs=np.column_stack(columns),
        prompts=np.column_stack([one.prompts[mine, 0] for one, mine in zip(parts, firsts, strict=True)]),
        seconds=sum(one.seconds for one in known.values()),
    )


def _read(
    spec: MemberSpec, passages: Sequence[Passage], member: int, progress: Progress | None, model: str | None
) -> Scores:
    """Return one member's scores of its own tokens, from the cache where they are known."""
    engine = spec.engine
    read = [_tokens(engine, passage, member) for passage in passages]
    path = _cache_path(engine, model, read, passages) if model is not None else None
    if path is not None and (found := cache.get(path, Scores.load)) is not None:
        if progress is not None:
            progress(spec.name, len(passages), len(passages))
        return found
    start = time.perf_counter()
    parts = []
    for at, (passage, (ids, bounds)) in enumerate(zip(passages, read, strict=True)):
        parts.append(_passage_scores(engine, passage, ids, bounds))
        if progress is not None:
            progress(spec.name, at + 1, len(passages))
    out = replace(joined(parts), seconds=time.perf_counter() - start)
    if path is not None:
        cache.put(out, path)
    return out


def _passage_scores(engine: Engine, passage: Passage, ids: Ids, bounds: npt.NDArray[np.int64]) -> Scores:
    """Read one passage from the beginning of a context. ids, bounds: what `_tokens` returns."""
    session = engine.session()
    scores = session.token_logprobs(ids)
    before = len(scores) - len(bounds)
    logprobs = scores[before:]
    starts, ends = np.concatenate([[0], bounds[:-1]]), bounds
    if passage.ends:
        logprobs = np.append(logprobs, _end_logprob(engine, session.logits(ids)[0]))
        starts, ends = np.append(starts, bounds[-1]), np.append(ends, bounds[-1])
    return Scores(
        (engine.name,),
        "token",
        passage.prompt + passage.data,
        starts=starts + len(passage.prompt),
        ends=ends + len(passage.prompt),
        begins=np.zeros(len(ends), dtype=np.int64),
        logprobs=logprobs[:, None],
        prompts=np.full((len(ends), 1), prompt_bits(scores[:before], passage.prompt)),
    )


def _end_logprob(engine: Engine, logits: Logits) -> float:
    """Return the natural log-probability that a text ends here. logits: (vocab,)."""
    values = logits.astype(np.float64)
    ends = values[sorted(engine.vocabulary.end_ids)]
    return float(np.logaddexp.reduce(ends) - np.logaddexp.reduce(values)) if ends.size else -math.inf


def _tokens(engine: Engine, passage: Passage, member: int) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Return all ids of a passage, and where the scored ones end, in bytes. Raises ConfigError if they do not fit."""
    own, bounds = spelling(engine, passage.data)
    ids: Ids = np.array([*passage.before[member], *own], dtype=np.int64)
    if len(ids) > engine.context_length:
        raise ConfigError(
            f"{len(ids)} tokens of a passage are more than {engine.name}'s context of {engine.context_length}",
            "shorten the prompt or the answer" if passage.prompt else None,
        )
    return ids, bounds


def spelling(engine: Engine, data: bytes) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Return a member's ids of a text, and where each of them ends in it, in bytes.

    Raises ConfigError when they do not spell the text exactly.
    """
    own = engine.encoder.encode(data).ids
    pieces = [engine.vocabulary.tokens[i] for i in own]
    spelled = b"".join(pieces)
    if spelled != data:
        raise ConfigError(
            f"the tokens of {engine.name} do not spell the text: {_difference(data, spelled)}",
            "its tokenizer changes or drops some characters; take them out of the text",
        )
    return own, np.cumsum([len(one) for one in pieces])


def _difference(data: bytes, spelled: bytes) -> str:
    """Say where what the tokens spell leaves the text."""
    at = next((i for i, (a, b) in enumerate(zip(data, spelled, strict=False)) if a != b), min(len(data), len(spelled)))
    while at > 0 and at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    there, instead = (one[at : at + 12].decode(errors="replace") for one in (data, spelled))
    return f"at {there!r} they have {instead!r}"


def _cache_path(
    engine: Engine,
    model: str,
    read: Sequence[tuple[Ids, npt.NDArray[np.int64]]],
    passages: Sequence[Passage],
) -> Path:
    """Return where a member's scores of these passages are kept: a hash of the model, the text and how it was cut."""
    about = [__version__, PASSAGE_BYTES, engine.name, dict(engine.details), model]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for (ids, _), passage in zip(read, passages, strict=True):
        for part in (ids.tobytes(), passage.prompt, passage.data, b"ends" if passage.ends else b""):
            digest.update(len(part).to_bytes(8, "little") + part)
    return cache.folder() / f"{digest.hexdigest()}.npz"
