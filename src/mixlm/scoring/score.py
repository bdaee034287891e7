"""Log-probability of given text: under each member, and under their mixture.

Members with one vocabulary meet at every token, and the mixture's probability is exact: `Σ_i λ_i p_i(t | before)`.
Members with different vocabularies meet where all of them have a token boundary. Between two such boundaries lies a
segment; its probability under the mixture is `Σ_i λ_i P_i(segment | before)`, the distribution of one coin a segment.
That is not the distribution of `piece`, whose probability of a text is a sum over all tokenizations; it shows how the
members complement each other, for one forward pass a member. In the units `word` and `byte` the probability is that of
the unit's own distribution, exactly, which takes a forward at each byte (`marginals`).

Members are scored without sampling options: the models are measured, not a way to sample from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.core.options import GenerationOptions
from mixlm.engines import Engine, is_remote
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.prompt import Prompt
from mixlm.models.resolve import resolve
from mixlm.routing.base import observed_by
from mixlm.scoring.marginals import TokenMatches, byte_logprobs, cached_matches, word_logprobs
from mixlm.scoring.member_scores import EncodedPassage, member_scores, observed_states, prompt_bits
from mixlm.scoring.passages import Before, Passage, answer_passages, bare_passages
from mixlm.scoring.scores import Scores, concatenate
from mixlm.terminal import Progress
from mixlm.tokenization.segments import common_boundaries, encode_exactly, first_tokens
from mixlm.types import Ids


def score(
    ensemble: Ensemble,
    text: str | bytes,
    *,
    progress: Progress | None = None,
    identities: Sequence[str | None] | None = None,
    by_segment: bool = False,
    before: Before = "begin",
) -> Scores:
    """Score a text under every member of an ensemble, one pass a member; in the units `word` and `byte`, byte by byte.

    Args:
        ensemble: The ensemble.
        text: The text; UTF-8 if bytes.
        progress: Called with a member's name, the passages done and their number (bytes in `word` and `byte`).
        identities: Each member's `identity`; with them, scores are cached and the same text is not read again.
        by_segment: Members meet at common token boundaries, whatever the unit.
        before: What stands in front of the text; see `text_prefix`.

    Raises:
        ConfigError: The text is empty, or a member's tokens do not spell it exactly.
    """
    data = text.encode(errors="replace") if isinstance(text, str) else text
    if not data:
        raise ConfigError("the text to score is empty")
    passages = bare_passages([data], [member.engine for member in ensemble.members], before)
    return score_passages(ensemble, passages, progress, identities, by_segment=by_segment)


def score_answers(
    ensemble: Ensemble,
    pairs: Sequence[tuple[Prompt, str]],
    *,
    settings: GenerationOptions | None = None,
    ends: bool | None = None,
    progress: Progress | None = None,
    identities: Sequence[str | None] | None = None,
) -> Scores:
    """Score answers, each after its prompt in each member's own template.

    An answer is taken as it stands, as a completion would be: a space in front of it counts.

    Args:
        ensemble: The ensemble.
        pairs: Prompts and answers.
        settings: Generation options, for a system message.
        ends: Whether the end of each answer is scored too, as a segment of no bytes whose probability is that of all
            the member's end-of-text ids. By default it is when every member ends its completions itself: one that
            relies on stop strings, as a base model in a plain template does, would be charged for an end that it never
            generates.
        progress: As for `score`.
        identities: As for `score`.

    Raises:
        ConfigError: There are no answers, or one is empty, or a member's tokens do not spell it exactly.
    """
    if not pairs:
        raise ConfigError("there are no answers to score")
    settings = settings or ensemble.settings()
    if ends is None:
        ends = not any(member.engine.stops for member in ensemble.members)
    if empty := next((number for number, (_, answer) in enumerate(pairs, start=1) if not answer), None):
        raise ConfigError(f"answer {empty} of {len(pairs)} is empty")
    passages = answer_passages(ensemble, pairs, settings, ends=ends)
    return score_passages(ensemble, passages, progress, identities)


def identity(model: str, dtype: str = "auto", adapter: str | None = None, revision: str | None = None) -> str | None:
    """Return a string that identifies a model: where it and its adapter lie, and the sizes and times of their files.

    None for a model behind a server, which may have another one tomorrow: its scores are not cached.
    """
    if is_remote(model):
        return None
    if model.startswith("toy:"):
        return model
    locations = [resolve(model, "float32" if dtype == "float32" else "bfloat16", revision).path_or_id]
    if adapter is not None:
        locations.append(adapter)
    parts: list[Any] = [part for location in locations for part in (location, _file_stamps(Path(location)))]
    return json.dumps(parts if revision is None else [revision, *parts])


def _file_stamps(folder: Path) -> list[list[str | int]]:
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def score_passages(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    progress: Progress | None = None,
    identities: Sequence[str | None] | None = None,
    *,
    by_segment: bool = False,
) -> Scores:
    """Score passages under every member, and bring the members together. Arguments as for `score`.

    What the ensemble's router observes is scored too, by one more pass of that member.
    """
    traits = ensemble.unit.traits
    observes = observed_by(ensemble.router, len(ensemble.members))
    if observes is not None and not traits.full_distributions and not by_segment:
        raise UnsupportedError(
            f"in the unit {ensemble.unit.name}, nothing of a member is observed along a text",
            "use --unit piece, or features of the text alone",
        )
    if not traits.full_distributions and not by_segment:
        return _marginal_scores(ensemble, passages, identities, progress)
    # A text that some member cannot read is refused before any member runs.
    encoded = [
        [_encode(member.engine, passage, i) for passage in passages] for i, member in enumerate(ensemble.members)
    ]
    models = identities or [None] * len(ensemble.members)
    known: dict[tuple[int, bytes], Scores] = {}
    parts: list[Scores] = []
    for i, member in enumerate(ensemble.members):
        # Members that share a model score alike, unless their templates differ.
        key = (id(member.engine), b"".join(passage.prefixes[i].tobytes() for passage in passages))
        if key not in known:
            known[key] = member_scores(member, passages, encoded[i], models[i], progress)
        parts.append(known[key])
    if observes is not None:
        i = observes.member
        states = observed_states(ensemble.members[i], observes, passages, encoded[i], models[i], progress)
        parts[i] = replace(parts[i], observed=states)
    scores = join_members(ensemble.names, parts, shared_vocabulary=traits.shared_vocabulary)
    return replace(scores, seconds=sum(part.seconds for part in known.values()))


def _marginal_scores(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    identities: Sequence[str | None] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score passages by the distribution of `word` or `byte`.

    In `byte` a segment is a byte, and the mixture's probability is exact for any weights. In `word` it is a word; two
    words that a token of some member could lie across are one segment, which depends on the ensemble's weights and so
    cannot be scored for a router's (`marginals`). Arguments as for `score`; token matches are cached by passage and
    member.

    Raises:
        UnsupportedError: An engine does not return every token's probability.
        PromptTooLongError: A passage does not fit a context.
    """
    start = time.perf_counter()
    total = sum(len(passage.data) + 1 for passage in passages)
    known: dict[tuple[int, int, bytes], tuple[TokenMatches, float]] = {}
    table: list[list[tuple[TokenMatches, float]]] = [[] for _ in passages]
    for i, member in enumerate(ensemble.members):
        model, done = identities[i] if identities else None, 0
        for number, passage in enumerate(passages):
            # Members that share a model score alike, unless their templates differ.
            prefix = passage.prefixes[i]
            key = (id(member.engine), number, prefix.tobytes())
            if key not in known:

                def report(offsets: int, done: int = done, name: str = member.name) -> None:
                    if progress is not None:
                        progress(name, done + offsets, total)

                bits = 0.0
                if passage.prompt:
                    bits = prompt_bits(member.engine.session().token_logprobs(prefix), passage.prompt)
                known[key] = cached_matches(member.engine, prefix, passage.data, model, report), bits
            table[number].append(known[key])
            done += len(passage.data) + 1
            if progress is not None:
                progress(member.name, done, total)
    parts = [_marginal_passage_scores(ensemble, passage, row) for passage, row in zip(passages, table, strict=True)]
    return replace(concatenate(parts), seconds=time.perf_counter() - start)


def _marginal_passage_scores(ensemble: Ensemble, passage: Passage, row: Sequence[tuple[TokenMatches, float]]) -> Scores:
    """Return the scores of one passage. row: each member's matches, and bits per byte of the prompt."""
    matches, bits = zip(*row, strict=True)
    end = passage.scores_end
    if ensemble.unit.traits.counts_bytes:
        starts = np.arange(len(passage.data) + end)
        logprobs = np.column_stack([byte_logprobs(own, end=end) for own in matches])
    else:
        starts, logprobs = word_logprobs(matches, passage.data, ensemble.weights, end=end)
    return Scores.of_passage(ensemble.names, ensemble.unit.name, passage, starts, logprobs, np.array(bits))


def join_members(names: Sequence[str], parts: Sequence[Scores], *, shared_vocabulary: bool = False) -> Scores:
    """Bring members together that were scored on the same passages, where all of them have a token boundary.

    Args:
        names: The members'.
        parts: Each member's scores of its own tokens; one of them may hold what is observed of the member.
        shared_vocabulary: Whether a segment is a token where all members have the same boundaries.

    Raises:
        ConfigError: They were scored on other texts, or on the same in other passages.
    """
    text = parts[0]
    passages = np.unique(text.passage_starts)
    if any(part.text != text.text or not np.array_equal(np.unique(part.passage_starts), passages) for part in parts):
        raise ConfigError("the members were scored on different texts or passages", "score the text anew")
    # End-of-text is a segment of no bytes: a boundary of its own after that of the last token.
    boundaries = [2 * part.ends + (part.starts == part.ends) for part in parts]
    common = common_boundaries(boundaries)
    firsts = [first_tokens(ends, common) for ends in boundaries]
    columns = [np.add.reduceat(part.logprobs[:, 0], first) for part, first in zip(parts, firsts, strict=True)]
    exact = shared_vocabulary and all(len(part.ends) == len(common) for part in parts)
    observed = [
        part.observed.select(first) for part, first in zip(parts, firsts, strict=True) if part.observed is not None
    ]
    return Scores(
        tuple(names),
        "token" if exact else "segment",
        text.text,
        starts=text.starts[firsts[0]],
        ends=common // 2,
        passage_starts=text.passage_starts[firsts[0]],
        logprobs=np.column_stack(columns),
        prompt_bits=np.column_stack([part.prompt_bits[first, 0] for part, first in zip(parts, firsts, strict=True)]),
        seconds=sum(part.seconds for part in parts),
        observed=observed[0] if observed else None,
    )


def _encode(engine: Engine, passage: Passage, member: int) -> EncodedPassage:
    """Return all ids of a passage, and where the scored ones end, in bytes. Raises ConfigError if they do not fit."""
    text_ids, bounds = encode_exactly(engine.encoder, engine.vocabulary, passage.data, engine.name)
    ids: Ids = np.array([*passage.prefixes[member], *text_ids], dtype=np.int64)
    if len(ids) > engine.context_length:
        raise ConfigError(
            f"{len(ids)} tokens of a passage are more than {engine.name}'s context of {engine.context_length}",
            "shorten the prompt or the answer" if passage.prompt else None,
        )
    return ids, bounds
