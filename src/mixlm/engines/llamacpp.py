"""Models through llama.cpp: GGUF files, memory-mapped, as they are. Needs the extra `llamacpp`.

Every question is one request for one token with the likeliest N and their probabilities, which costs no more than the
same token inside a longer run (docs/engines.md has the figures), so letting llama.cpp draw several gains nothing.
Noise, transforms and laws are mixlm's own. The prefix cache of a slot does the catching up.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Spinning OpenMP threads starve each other on shared machines; this must be set before llama.cpp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mixlm.engines.base import Reply, Request, Session
from mixlm.engines.partial import PartialEngine, PartialSession
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer import TextSide, load_tokenizer
from mixlm.errors import ConfigError, EngineError, ModelLoadError, TokenizerError
from mixlm.models.header import read_header
from mixlm.sampling import Candidates, Ids, Logits

# Memory for keys and values is taken when a model is loaded, for each slot.
_CONTEXT = 8192


class LlamaCppEngine(PartialEngine):
    """A GGUF model in llama.cpp, with the tokenizer in `folder`.

    Sessions hold a slot each; when there are more of them than slots, the one that has rested longest loses its own and
    reads its text anew when it is next asked. dtype "float32" runs one token at a time, also in prompts: then what a
    member answers depends on nothing but the ids, to the last bit, where otherwise the kernels for several tokens
    round differently from those for one.

    Raises ModelLoadError when it cannot be loaded, ConfigError for another dtype.
    """

    def __init__(self, spec: EngineSpec, path: Path, folder: Path) -> None:
        self.name = spec.name
        if spec.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"dtype is {spec.dtype!r}, and llama.cpp runs {path.name} in the types that the file has",
                "leave dtype out, or use --engine hf",
            )
        header = read_header(path)
        self.candidates = min(spec.candidates, header.tokens)
        self.context_length = spec.context or min(header.context or _CONTEXT, _CONTEXT)
        tokenizer = load_tokenizer(str(folder), spec.name)
        if len(tokenizer) > header.tokens:
            raise TokenizerError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens, and {path.name} has {header.tokens}",
                "it belongs to another model",
            )
        text = TextSide.of(tokenizer, folder, spec, header.tokens, header.ends)
        self.encoder, self.vocabulary, self.prompts = text.encoder, text.vocabulary, text.prompts
        self.stops, self.notes = text.stops, text.notes
        self.prepare()
        letters = (i for i, token in enumerate(self.vocabulary.tokens) if token.isalpha() and token.isascii())
        self.whole_character = next(letters, 0)
        self.weights_bytes = path.stat().st_size
        exact = spec.dtype == "float32"
        self.server = _serve(spec, path, self.context_length, exact)
        self.details = {"engine": "llama.cpp", "device": "cpu", "dtype": "one token at a time" if exact else "GGUF"}
        self.slots = Slots(spec.slots)
        self._threads = ThreadPoolExecutor(spec.slots)
        # One answer now tells a library that answers otherwise at once, and not in the first reply. It also makes sure
        # that the server's loop runs: a server that is dropped before never ends.
        self.session().logits(np.flatnonzero(self.drawable)[:1])

    def session(self) -> LlamaCppSession:
        """Begin a sequence; it takes a slot when it is first asked."""
        return LlamaCppSession(self)

    def answer(self, requests: Sequence[tuple[Session, Request]]) -> list[Reply]:
        """Answer questions of several sequences together: llama.cpp runs slots that are busy at once as one batch."""
        by_session: dict[int, list[int]] = {}
        for at, (session, _) in enumerate(requests):
            by_session.setdefault(id(session), []).append(at)
        if len(by_session) == 1:
            return super().answer(requests)
        one_by_one = super().answer
        parts = [[requests[at] for at in places] for places in by_session.values()]
        replies: list[Reply] = [None] * len(requests)
        for places, found in zip(by_session.values(), self._threads.map(one_by_one, parts), strict=True):
            for at, reply in zip(places, found, strict=True):
                replies[at] = reply
        return replies


class LlamaCppSession(PartialSession):
    """One sequence. Its cache is the slot that it holds, if it still holds one."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        super().__init__(engine)
        self._engine = engine

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits of the likeliest tokens after each of the last prefixes, -inf for the others."""
        with self._engine.slots.held(self) as (self._slot, kept):
            # What another session left in a slot is never built on, though its beginning may be the same: how a text
            # was cut into forwards shows in the last digits, and equal seeds give equal texts.
            self.keeps_cache = self._builds_on = kept
            try:
                return super().logits(ids, last)
            finally:
                self.keeps_cache = True

    def _likeliest(self, ids: Ids, count: int) -> Candidates:
        asked = {"n_probs": count, "top_k": count, "samplers": ["top_k"], "post_sampling_probs": True}
        found = self._ask(ids, asked)
        if found is None:
            # What llama.cpp drew is part of a character, and it keeps the numbers back until the rest comes. So ask
            # once more, for the numbers from before its own draw, and have it draw a whole character. (To ask like
            # this every time would sort the whole vocabulary for each token.)
            forced = [[self._engine.whole_character, 1000.0]]
            found = self._ask(ids, {"n_probs": count, "logit_bias": forced})
        if found is None:
            raise EngineError(f"llama.cpp keeps the probabilities of {self._engine.name} back", "use --engine hf")
        return found

    def _ask(self, ids: Ids, options: dict[str, Any]) -> Candidates | None:
        request = {
            "prompt": ids.tolist(),
            "id_slot": self._slot,
            "cache_prompt": self._builds_on,
            "n_predict": 1,
            "temperature": 1.0,
            "seed": 0,
            **options,
        }
        answer = self._engine.server.handle_completions(request)
        self._builds_on = True
        return _candidates(self._engine.name, answer)


class Slots:
    """Which session holds which slot. The session that has rested longest gives way when there are too few."""

    def __init__(self, count: int) -> None:
        self._owners: OrderedDict[int, weakref.ref[Session] | None] = OrderedDict.fromkeys(range(count))
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, session: Session) -> Iterator[tuple[int, bool]]:
        """Give a session a slot while it runs, its own where it has one. Also tells whether it had it already."""
        with self._changed:
            while (slot := self._choose(session)) is None:
                self._changed.wait()
            kept = self._owner(slot) is session
            self._owners[slot] = weakref.ref(session)
            self._owners.move_to_end(slot)
            self._busy.add(slot)
        try:
            yield slot, kept
        finally:
            with self._changed:
                self._busy.discard(slot)
                self._changed.notify_all()

    def _choose(self, session: Session) -> int | None:
        """Return its own slot, else a free one, else the one that has rested longest; None while all are busy."""
        idle = [slot for slot in self._owners if slot not in self._busy]
        for wanted in (session, None):
            for slot in idle:
                if self._owner(slot) is wanted:
                    return slot
        return idle[0] if idle else None

    def _owner(self, slot: int) -> Session | None:
        held = self._owners[slot]
        return None if held is None else held()


def _serve(spec: EngineSpec, path: Path, context: int, exact: bool) -> Any:
    """Load the weights."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = spec.slots
    params.n_ctx = context * spec.slots
    threads = len(os.sched_getaffinity(0))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.verbosity = -1
    params.warmup = params.fit_params = params.ui = False
    # Sliding windows keep every position, so that any prefix can be gone back to; slots are never swapped out.
    params.swa_full = True
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    if exact:
        params.n_ubatch = 1
        params.no_extra_bufts = True
    # The library listens on the loopback whether it is asked or not: nobody else may use it.
    params.api_keys = [secrets.token_hex(16)]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelLoadError(
            f"llama.cpp cannot load {path}: {error}",
            "its architecture may be unknown to it, or memory too small for slots × context; or use --engine hf",
        ) from error


def _candidates(name: str, answer: Any) -> Candidates | None:
    """Read the likeliest tokens from an answer; None where it has none. Raises EngineError when it is no answer."""
    try:
        told = answer["choices"][0]["logprobs"]
        if told is None:
            return None
        [token] = told["content"]
        if "top_probs" in token:
            found = [(one["id"], one["prob"]) for one in token["top_probs"]]
        else:
            found = [(one["id"], math.exp(one["logprob"])) for one in token["top_logprobs"]]
        ids, probs = np.array([i for i, _ in found], dtype=np.int64), np.array([p for _, p in found])
    except (TypeError, LookupError, ValueError):
        said = answer.get("error", {}).get("message", answer) if isinstance(answer, dict) else answer
        raise EngineError(f"llama.cpp gives no answer for {name}: {str(said)[:200]}") from None
    with np.errstate(divide="ignore"):
        return Candidates(ids, np.log(probs))
