"""Forwards of a transformers model: for one sequence, or for many at once, each behind a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mixlm.engines.base import Request, Response, Session
from mixlm.engines.batching import Found, Part, respond_batched
from mixlm.engines.transformers.lora import LoadedModel
from mixlm.errors import MemoryLimitError, MixlmError, UnsupportedError
from mixlm.types import Floats, Ids, Logits, LogitsRow

if TYPE_CHECKING:
    from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
    from mixlm.engines.transformers.device_topk import DeviceTopK
    from mixlm.engines.transformers.run_ahead import DeviceSampler, RunAhead

# A long prompt is run in parts, so that attention scores of all its positions never lie in memory at once; and this is
# how many tokens of all sequences together are run in one forward.
MOST = 1024
# What torch, safetensors and the system say when memory is out, where it is no error of a type of its own.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")
_TRIED = 24  # tokens
_DIFFERENCE = 0.05  # total variation; bfloat16 alone makes up to 0.03
# What may be raised where a model or a device cannot do what is tried.
_UNFIT = (MemoryLimitError, NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError)
# Calls of one sequence, behind one of several, before it goes ahead again: where others are at work, they would wait.
_CROWDED = 16


class HFSession(Session):
    """One sequence. Every position is kept, also where the model attends to a window only: text may be taken back."""

    def __init__(self, runner: ModelRunner, context_length: int) -> None:
        super().__init__(context_length)
        self._runner = runner
        self.keeps_cache = not runner.recomputes
        self.cache: Any = None
        self.lead: RunAhead | None = None

    @property
    def has_run_ahead(self) -> bool:
        """Whether forwards were run that nobody has asked for yet."""
        return bool(self.lead)

    def drop(self) -> None:
        """Give up what was run ahead."""
        self.stats.wasted += len(self.lead or ())
        self.lead = None

    def _truncate(self, length: int) -> int:
        self.drop()
        if length == 0:
            self.cache = None
        elif self._runner.batches:
            self.cache.length = length
        else:
            self.cache.crop(length - self.cache.get_seq_length())
        return length

    def _forward(self, ids: Ids, last: int) -> Logits:
        [logits] = self._runner.whole([Part(self, ids, last)])
        return logits

    def _log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row, on all cores."""
        import torch

        sums: Floats = torch.from_numpy(logits).logsumexp(dim=1).double().numpy()
        return sums


class ModelRunner:
    """A loaded model as a function from what sessions lack to logits.

    recomputes: the model carries a state instead of keys and values, and cannot take tokens back. batches: it runs
    several sequences at once. steps: forwards of one sequence in fixed shapes, where they are used. largest: brings no
    more logits to the host than are needed, where that is not where they are. draws: where forwards are run before they
    are asked for, what draws their tokens.
    graphs: "auto" uses them on CUDA where the model can, "on" wherever it can, "off" nowhere. Raises UnsupportedError
    for "on" and a model that cannot.
    """

    def __init__(self, loaded: LoadedModel, name: str, graphs: str = "auto") -> None:
        self.model = loaded.model
        self._loaded = loaded
        self._adapter: str | None = None
        self.recomputes = bool(getattr(self.model, "_is_stateful", False))
        self.batches = False
        self.steps: CudaGraphRunner | None = None
        self.largest: DeviceTopK | None = None
        self.draws: DeviceSampler | None = None
        self._crowded = 0
        if self.model.device.type == "cuda":
            from mixlm.engines.transformers.device_topk import DeviceTopK

            self.largest = DeviceTopK()
        self._name = name
        loaded.runners[None] = self
        self.batches = self._batches()
        self.steps = self._stepped(graphs)
        if self.steps is not None:
            self.draws = self._ahead()

    @property
    def run_ahead_depth(self) -> int:
        """How many positions behind the one in question it runs ahead; 0 where it does not."""
        if self.draws is None:
            return 0
        from mixlm.engines.transformers.run_ahead import DEPTH

        return DEPTH

    @property
    def details(self) -> dict[str, str]:
        """How its forwards are run, for reports; nothing where there is one way."""
        if self.steps is None:
            return {}
        return {"short forwards": "captured graphs" if self.steps.captures else "fixed shapes"}

    def using(self, adapter: str | None) -> ModelRunner:
        """Return the runner of the same model with an adapter, or without one: the same one for the same adapter."""
        if adapter == self._adapter:
            return self
        other = copy(self)
        other._adapter = adapter
        if self.steps is not None:
            other.steps = self.steps.anew()  # what is captured runs the model as it was then
        known: ModelRunner = self._loaded.runners.setdefault(adapter, other)
        return known

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Answer requests of several sessions together."""
        return respond_batched(requests, self.run, MOST)

    def run(self, parts: Sequence[Part]) -> list[Found]:
        """Run what sessions lack, and return what `together.Run` says for each part. Raises MemoryLimitError."""
        import torch

        with torch.inference_mode(), memory_errors(self._name), self._loaded.using(self._adapter):
            behind = []
            for one in parts:
                head = max(len(one.ids) - max(MOST, one.last), 0) if not self.recomputes else 0
                for start in range(0, head, MOST):
                    self._forward([Part(one.session, one.ids[start : min(start + MOST, head)], 1)])
                behind.append(one._replace(ids=one.ids[head:]))
            return self._forward(behind)

    def whole(self, parts: Sequence[Part]) -> list[Logits]:
        """Run parts without cuts: float32 (last, vocab) for each. Raises MemoryLimitError."""
        return [cast("Logits", one) for one in self.run(parts)]

    def _forward(self, parts: Sequence[Part]) -> list[Found]:
        import torch

        device = self.model.device
        if not self.batches:
            [part] = parts
            ids = torch.tensor(part.ids[None], device=device)
            out = self.model(input_ids=ids, logits_to_keep=part.last, **self._cached(part.session)).logits
            return self._brought(out[0, -part.last :], parts)
        self._crowded = _CROWDED if len(parts) > 1 else max(self._crowded - 1, 0)
        row = self._known(parts[0]) if len(parts) == 1 else None
        if row is not None:
            return [[row]]
        logits = self._run(parts)
        row = self._led(parts[0], logits) if len(parts) == 1 else None
        if row is not None:
            return [[row]]
        if parts[
            0
        ].session.has_run_ahead:  # for what is needed whole; but other steps have written over the logits by now
            cast(HFSession, parts[0].session).cache.length -= 1
            logits = self._run([parts[0]._replace(ids=parts[0].ids[-1:])])
        return self._brought(logits, parts)

    def _run(self, parts: Sequence[Part]) -> Any:
        """Run all parts in one forward: the logits that are asked for, a tensor (rows, vocab)."""
        import torch

        from mixlm.engines.transformers.kv_cache import KVCache, PackedSequences

        sessions = [cast(HFSession, one.session) for one in parts]
        for session in sessions:
            session.drop()
            session.cache = session.cache or KVCache(None if self.steps is None else self.steps.rooms)
        counts = [len(one.ids) for one in parts]
        if self.steps is not None and len(parts) == 1 and self.steps.fit(sessions[0].cache, counts[0]):
            return self.steps.run(sessions[0].cache, parts[0].ids, parts[0].last)
        # A copy: the callers' arrays are views of buffers that go on changing.
        device = self.model.device
        ids = torch.tensor(np.concatenate([one.ids for one in parts])[None], device=device)
        rows = PackedSequences([session.cache for session in sessions], counts)
        asked = np.concatenate(
            [np.arange(end - one.last, end) for one, end in zip(parts, np.cumsum(counts), strict=True)]
        )
        out = self.model(
            input_ids=ids,
            position_ids=torch.tensor(rows.positions()[None], device=device),
            logits_to_keep=torch.tensor(asked, device=device),
            use_cache=False,
            rows=rows,
        ).logits
        rows.done()
        return out[0]

    def _known(self, part: Part) -> LogitsRow | None:
        """Return the answer to a part that was run before it was asked for, if it was."""
        session = cast(HFSession, part.session)
        lead = session.lead
        if not lead or part.cut is not lead.cut or len(part.ids) > 1:
            return None
        row = lead.after(int(part.ids[0]), part.ahead)
        session.stats.run_ahead += row is not None
        return row

    def _led(self, part: Part, logits: Any) -> LogitsRow | None:
        """Run on behind a part's logits, if what comes next is told. Returns its answer, None where it did not."""
        if self.draws is None or part.ahead is None or part.cut is None or self._crowded:
            return None
        from mixlm.engines.transformers.run_ahead import RunAhead

        session = cast(HFSession, part.session)
        assert self.steps is not None
        if not RunAhead.can(self.steps, session.cache, part.cut, logits.shape[1]):
            return None
        session.lead = RunAhead(self.steps, self.draws, session.cache, part.cut, session.context_length)
        return session.lead.begin(logits, part.ahead)

    def _brought(self, logits: Any, parts: Sequence[Part]) -> list[Found]:
        """Bring the logits of all parts, a tensor (rows, vocab), to the host, or as much of them as is needed."""
        ends = np.cumsum([one.last for one in parts])
        if self.largest is None or all(one.cut is None for one in parts):
            whole: Logits = logits.float().cpu().numpy()
            return list(np.split(whole, ends[:-1]))
        rows = self.largest.of(logits, [one.cut for one in parts for _ in range(one.last)])
        own = [rows[end - one.last : end] for one, end in zip(parts, ends.tolist(), strict=True)]
        return [
            those if one.cut is not None else np.stack(cast("list[Logits]", those))
            for one, those in zip(parts, own, strict=True)
        ]

    def _cached(self, session: Session) -> dict[str, Any]:
        """Return what a forward of one sequence is called with, for models that cannot run several at once."""
        from transformers import DynamicCache

        if self.recomputes:
            return {"use_cache": False}
        one = cast(HFSession, session)
        # One made from the model's config would forget what leaves a window, and could not be cut back into it.
        one.cache = DynamicCache() if one.cache is None else one.cache
        return {"past_key_values": one.cache, "use_cache": True}

    def _batches(self) -> bool:
        """Whether the model gives several sequences at once what it gives each alone: tried, not guessed."""
        if self.recomputes:
            return False
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from mixlm.engines.transformers.kv_cache import NAME, attend

        usual = self.model.config._attn_implementation
        size = self.model.get_output_embeddings().weight.shape[0]
        ids = np.arange(_TRIED, dtype=np.int64) % size
        expected = self.whole([Part(self._session(), ids, 1)])[0]
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        try:
            self.model.set_attn_implementation(NAME)
            if self.model.config._attn_implementation == NAME:
                self.batches = True
                one, other = self._session(), self._session()
                self.run([Part(one, ids[:9], 1), Part(other, ids[:4], 1)])
                self.run([Part(other, ids[4:5], 1), Part(one, ids[9:], 1)])
                found = self.whole([Part(one, ids[:1], 1), Part(other, ids[5:], 1)])[1]
                if _total_variation(found, expected) < _DIFFERENCE:
                    return True
        except _UNFIT:
            pass  # models differ in what their attention asks for, and in what they let a caller say
        self.batches = False
        self.model.set_attn_implementation(usual)
        return False

    def _stepped(self, graphs: str) -> CudaGraphRunner | None:
        """Return the steps, where they are wanted and give what the usual forward gives: tried, not guessed."""
        cuda = self.model.device.type == "cuda"
        if graphs == "off" or (graphs == "auto" and not cuda):
            return None
        if self.batches:
            from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner

            ids = np.arange(_TRIED, dtype=np.int64) % self.model.get_output_embeddings().weight.shape[0]
            [expected] = self.whole([Part(self._session(), ids, 4)])
            self.steps = CudaGraphRunner(self.model, capture=cuda)
            try:
                found = self._in_steps(ids)
                if all(_total_variation(a, b) < _DIFFERENCE for a, b in zip(found, expected, strict=True)):
                    return self.steps
            except _UNFIT:
                pass  # a model may look at numbers on the host, which a captured forward cannot
            self.steps = None
        if graphs == "on":
            raise UnsupportedError(
                f"{self._name} cannot run in steps of fixed shape", "leave graphs at auto, or set it to off"
            )
        return None

    def _in_steps(self, ids: Ids) -> Logits:
        """Return the logits of the last 4 positions, run in steps of every kind: new, captured and replayed."""
        session = self._session()
        self.run([Part(session, ids[:7], 1)])
        for at in range(7, len(ids) - 5):
            self.run([Part(session, ids[at : at + 1], 1)])
        before = session.cache.length
        for _ in range(3):
            session.cache.length = before
            [found] = self.whole([Part(session, ids[before:], 4)])
        return found

    def _ahead(self) -> DeviceSampler | None:
        """Return what draws tokens of forwards that are run ahead, where that finds what steps find: tried."""
        from mixlm.engines.transformers.device_topk import DeviceTopK
        from mixlm.engines.transformers.run_ahead import DeviceSampler, written

        self.draws = DeviceSampler(self.largest or DeviceTopK())
        try:
            session = self._session()
            ids, rows = written(self.run, session, self.model.get_output_embeddings().weight.shape[0])
            [expected] = self.whole([Part(self._session(), ids, len(rows))])
            both = zip(rows, expected, strict=True)
            agree = all(_total_variation(row.logprobs, whole[row.ids]) < _DIFFERENCE for row, whole in both)
            return self.draws if agree and session.stats.run_ahead == len(rows) - 1 else None
        except _UNFIT:
            return None  # what a device cannot do of this, it can do one forward at a time

    def _session(self) -> HFSession:
        return HFSession(self, _TRIED)


def _total_variation(a: Logits, b: Logits) -> float:
    one, other = (np.exp(x.astype(np.float64) - x.max()) for x in (a, b))
    return float(0.5 * np.abs(one / one.sum() - other / other.sum()).sum())


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Turn torch's ways of saying that memory is out into one error."""
    import torch

    try:
        yield
    except MixlmError:
        raise
    except Exception as error:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(one in said for one in _NO_MEMORY):
            raise MemoryLimitError(
                f"the device has too little memory for {name}", "use --dtype bfloat16, or smaller members"
            ) from error
        raise
