"""vLLM in this process: one thread that owns it, and takes requests as they come.

Requests of several sequences join one batch, and leave it when they are done; whoever asks waits for a future.
"""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from mixlm.errors import EngineError
from mixlm.types import Ids

# One process, and only what this project is told: read when vLLM is imported.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_SGL_KERNEL": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}


# An engine of vLLM that is dropped takes down what all of a process use together: it is kept until the last has ended.
_lock = threading.Lock()
_running: set[int] = set()
_ended: list[Any] = []


@dataclass(frozen=True)
class VllmOutput:
    """What one request wrote: ids, for each its log-probability and the likeliest tokens where they were asked for."""

    ids: list[int]
    logprobs: list[dict[int, float]]
    cached: int


class EngineThread:
    """vLLM's engine in a thread of its own. Raises what vLLM raises when it cannot load a model.

    options: of `vllm.LLM`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._inbox: queue.SimpleQueue[tuple[Ids, dict[str, Any], Future[VllmOutput]] | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[VllmOutput]] = {}
        self._failed: str | None = None
        ready: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, args=(options, ready), name="mixlm-vllm", daemon=True)
        self._thread.start()
        self.config = ready.result()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self._failed is None

    def submit(self, ids: Ids, params: dict[str, Any]) -> Future[VllmOutput]:
        """Ask for tokens behind `ids`. params: of `vllm.SamplingParams`."""
        future: Future[VllmOutput] = Future()
        self._inbox.put((ids, params, future))
        if not self.alive:
            self._give_up()
        return future

    def close(self) -> None:
        """End the thread when it has answered what it was asked."""
        self._inbox.put(None)

    def _run(self, options: dict[str, Any], ready: Future[Any]) -> None:
        try:
            from vllm import LLM

            engine = LLM(**options).llm_engine
        except BaseException as error:
            ready.set_exception(error)
            return
        with _lock:
            _running.add(id(engine))
        ready.set_result(engine.vllm_config)
        try:
            self._serve(engine)
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
        self._give_up()
        with _lock:
            _running.discard(id(engine))
            _ended.append(engine)
            if not _running:
                _ended.clear()

    def _give_up(self) -> None:
        """Fail what waits: the thread has ended."""
        error = EngineError(f"vLLM has stopped: {self._failed or 'it was closed'}")
        with suppress(queue.Empty):
            while True:
                asked = self._inbox.get_nowait()
                if asked is not None:
                    asked[2].set_exception(error)
        for future in self._waiting.values():
            future.set_exception(error)
        self._waiting.clear()

    def _serve(self, engine: Any) -> None:
        numbers = count()
        while True:
            while not self._waiting or not self._inbox.empty():
                asked = self._inbox.get()
                if asked is None:
                    return
                self._add(engine, str(next(numbers)), *asked)
            for one in engine.step():
                if one.finished:
                    output = _output(one)
                    self._waiting.pop(one.request_id).set_result(output)

    def _add(self, engine: Any, name: str, ids: Ids, params: dict[str, Any], future: Future[VllmOutput]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            own = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **params)
            engine.add_request(name, {"prompt_token_ids": ids.tolist()}, own)
        except Exception as error:  # whatever it refuses a request with: the others go on
            future.set_exception(EngineError(f"vLLM refuses: {error}"))
        else:
            self._waiting[name] = future


def _output(finished: Any) -> VllmOutput:
    [written] = finished.outputs
    told = [{i: one.logprob for i, one in position.items()} for position in written.logprobs or ()]
    return VllmOutput(list(written.token_ids), told, finished.num_cached_tokens or 0)
