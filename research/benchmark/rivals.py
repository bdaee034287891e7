"""What a user would run without mixlm: transformers' own `generate`, measured in the same run.

Each member alone, and for two members with vocabularies of the same size, assisted generation with
`assistant_ensemble_weight`: the smaller one drafts, and a draft x is accepted with probability
min(1, 1 - w + w·p(x)/q(x)), w being the larger one's weight. That is not the ensemble's distribution: the token after a
block whose drafts were all accepted comes from the larger model alone, at every temperature.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mixlm.benchmark.report import memory_in_use
from mixlm.benchmark.timing import TimedRun, method_settings
from mixlm.engines import Engine
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import MixlmError
from mixlm.types import Sampling

ASSISTED = "transformers assistant_ensemble_weight"
_MAX_DRAFT_TOKENS = 20  # what transformers drafts at most by default


class Rival:
    """transformers' `generate`, alone or with an assistant.

    members: the model that writes, then its assistant. sampling: the writing member's options.
    """

    method = "transformers"
    draft: str | None = None

    def __init__(self, ensemble: Ensemble, members: tuple[int, ...], prompt: str, options: Mapping[str, Any]) -> None:
        self.members = tuple(ensemble.names[i] for i in members)
        self.label = f"transformers {self.members[0]}" if len(members) == 1 else ASSISTED
        self._assisted = len(members) > 1
        self.draft = self.members[1] if self._assisted else None
        self._engines = [_own(ensemble.members[i].engine) for i in members]
        settings = method_settings(ensemble, "mixture", options)
        self._seed = settings.seed
        self._ids = ensemble.encode_prompt(prompt, settings).ids[members[0]]
        self._options = _options(settings.member_sampling(ensemble.members[members[0]].sampling), self._engines[0])
        if self._assisted:
            weights = ensemble.weights[list(members)]
            self._options["assistant_ensemble_weight"] = float(weights[0] / weights.sum())

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write after the first token, or with an assistant after the first block."""
        import torch
        from transformers import GenerationConfig

        count = tokens + 1 + (_MAX_DRAFT_TOKENS if self._assisted else 0)
        config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, **self._options)
        models = _models(self._engines)
        main = models[0]
        ids = torch.tensor(self._ids[None], device=main.device)
        more: dict[str, Any] = {"assistant_model": models[1]} if self._assisted else {}
        clock = _TokenClock()
        with _generating(models), _counted(models, clock), torch.inference_mode():
            torch.manual_seed(self._seed + sequence)
            start = time.perf_counter()
            main.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock, **more)
        first, end = clock.puts[1][0], clock.puts[-1][0]  # the first of all is the prompt
        written = [token for _, ids in clock.puts[2:] for token in ids]
        return TimedRun(
            tokens=len(written),
            seconds=end - first,
            first=first - start,
            bytes=sum(len(self._engines[0].vocabulary.tokens[token]) for token in written),
            forwards=[[forward for began, forward in log if began > first] for log in clock.logs],
            memory=memory_in_use(),
        )


def available_rivals(ensemble: Ensemble, prompt: str, options: Mapping[str, Any]) -> tuple[list[Rival], list[str]]:
    """Return the rivals that can run with these members, and a sentence on each that cannot."""
    rivals: list[Rival] = []
    notes: list[str] = []
    reasons = [_reason(ensemble, i, options) for i in range(len(ensemble.members))]
    for i, name in enumerate(ensemble.names):
        if reasons[i] is None:
            rivals.append(Rival(ensemble, (i,), prompt, options))
        else:
            notes.append(f"transformers {name} was left out: {reasons[i]}")
    order = sorted(range(len(ensemble.members)), key=lambda i: -ensemble.members[i].engine.weights_bytes)
    reason = _assisted_reason(ensemble, reasons)
    if reason is None:
        rivals.append(Rival(ensemble, tuple(order), prompt, options))
        notes.append(f"{ASSISTED}: {ensemble.names[order[1]]} drafts; its distribution is not the ensemble's")
        if any("weights" in member.engine.details for member in ensemble.members):
            notes.append(f"{ASSISTED}: with dummy weights, its acceptance rate means nothing")
    else:
        notes.append(f"{ASSISTED} was left out: {reason}")
    return rivals, notes


def _reason(ensemble: Ensemble, member: int, options: Mapping[str, Any]) -> str | None:
    """Say why transformers cannot write as this member would; None when it can."""
    spec = ensemble.members[member]
    if not hasattr(getattr(_own(spec.engine), "model", None), "generate"):
        return "it is no model of transformers"
    if getattr(_own(spec.engine), "adapter", None) is not None:
        return "its adapter is switched on by mixlm alone"
    try:
        sampling = method_settings(ensemble, "mixture", options).member_sampling(spec.sampling)
    except MixlmError as error:
        return error.message
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "it has no presence and frequency penalties"
    return None


def _assisted_reason(ensemble: Ensemble, reasons: Sequence[str | None]) -> str | None:
    """Say why two members cannot write together in transformers; None when they can."""
    if len(reasons) != 2:
        return f"it takes two members, and there are {len(reasons)}"
    engines = [_own(member.engine) for member in ensemble.members]
    sizes = [engine.vocabulary.size for engine in engines]
    obstacles = {
        "both members are one model": _models(engines)[0] is _models(engines)[1],
        "the members share no vocabulary": not ensemble.unit.traits.shared_vocabulary,
        f"its members need equal numbers of rows, and these have {sizes[0]} and {sizes[1]}": sizes[0] != sizes[1],
        "it needs weights between 0 and 1": not all(ensemble.weights > 0),
        "agreement by construction is not known to it": any("agreement" in e.engine.details for e in ensemble.members),
    }
    refusals = [
        *(reason for reason in reasons if reason is not None),
        *(obstacle for obstacle, there in obstacles.items() if there),
    ]
    return refusals[0] if refusals else None


def _own(engine: Engine) -> Engine:
    """Return the engine itself where another stands before it."""
    inner: Engine = getattr(engine, "inner", engine)
    return inner


def _models(engines: Sequence[Engine]) -> list[Any]:
    """Return their models of transformers; None for an engine that has none."""
    return [getattr(engine, "model", None) for engine in engines]


def _options(sampling: Sampling, engine: Engine) -> dict[str, Any]:
    ends = sorted(engine.vocabulary.end_ids)
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": ends,
        "pad_token_id": ends[0],
    }


class _TokenClock:
    """Takes down when tokens came, as transformers' streamers do, and what the models ran."""

    def __init__(self) -> None:
        self.puts: list[tuple[float, list[int]]] = []
        self.logs: list[list[tuple[float, Forward]]] = []

    def put(self, value: Any) -> None:
        """Take down tokens; the first are the prompt."""
        self.puts.append((time.perf_counter(), value.flatten().tolist()))

    def end(self) -> None:
        """Nothing is left to do."""


@contextmanager
def _counted(models: list[Any], clock: _TokenClock) -> Iterator[None]:
    """Count forwards and their tokens. Their seconds are not known: a device works on after a call returns."""
    handles = []
    for model in models:
        log: list[tuple[float, Forward]] = []
        clock.logs.append(log)

        def note(_: Any, args: Any, kwargs: Any, log: list[tuple[float, Forward]] = log) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            log.append((time.perf_counter(), Forward(int(ids.shape[1]), 0, 0.0)))

        handles.append(model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _generating(models: list[Any]) -> Iterator[None]:
    """Give the models transformers' own attention for a while, and keep it from talking."""
    from transformers.utils import logging

    from mixlm.engines.transformers.attention import ATTENTION_NAME

    verbosity = logging.get_verbosity()
    changed = [model for model in models if model.config._attn_implementation == ATTENTION_NAME]
    logging.set_verbosity_error()
    try:
        for model in changed:
            model.set_attn_implementation("sdpa")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        for model in changed:
            model.set_attn_implementation(ATTENTION_NAME)
