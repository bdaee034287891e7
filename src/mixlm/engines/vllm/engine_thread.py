"""vLLM in this process: one thread that owns it, and takes requests as they come.

Requests of several sequences join one batch, and leave it when they are done; callers wait for a future.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

from mixlm.errors import EngineError
from mixlm.types import Ids

# One process, and only what this project logs: read when vLLM is imported.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_SGL_KERNEL": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}

# An engine of vLLM that is freed takes down what all of a process share: it is kept until the last one is closed.
_lock = threading.Lock()
_running: set[int] = set()
_closed: list[Any] = []


class VllmOutput(NamedTuple):
    """What one request generated.

    logprobs: for each token, the log-probabilities by id of the token itself and of the top tokens, where they were
    requested.
    """

    ids: list[int]
    logprobs: list[dict[int, float]]


class VllmBackend:
    """vLLM's engine, which runs requests in steps. Created and used in one thread.

    It raises what vLLM raises when it cannot load a model. config: vLLM's `VllmConfig`.

    Args:
        options: of `vllm.LLM`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self._engine = LLM(**options).llm_engine
        self.config = self._engine.vllm_config
        with _lock:
            _running.add(id(self._engine))

    def add(self, name: str, ids: Ids, parameters: dict[str, Any]) -> None:
        """Add a request. parameters: of `vllm.SamplingParams`. Raises any exception for one that it refuses."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **parameters)
        self._engine.add_request(name, {"prompt_token_ids": ids.tolist()}, params)

    def step(self) -> list[tuple[str, VllmOutput]]:
        """Run one step, and return the requests that are finished, by name."""
        return [(output.request_id, _read(output)) for output in self._engine.step() if output.finished]

    def close(self) -> None:
        """Let go of the engine."""
        with _lock:
            _running.discard(id(self._engine))
            _closed.append(self._engine)
            if not _running:
                _closed.clear()


_Submitted = tuple[Ids, dict[str, Any], Future[VllmOutput]]


class EngineThread(threading.Thread):
    """A backend in a thread of its own.

    Args:
        create: makes the backend, in the thread; what it raises is raised here.
    """

    def __init__(self, create: Callable[[], VllmBackend]) -> None:
        ready: Future[Any] = Future()
        # The thread forgets its arguments when it ends: what `create` refers to may keep the backend.
        super().__init__(target=self._own, args=(create, ready), name="mixlm-vllm", daemon=True)
        self._inbox: queue.SimpleQueue[_Submitted | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[VllmOutput]] = {}
        self._failure: str | None = None
        self.start()
        self.config = ready.result()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self.is_alive() and self._failure is None

    def submit(self, ids: Ids, parameters: dict[str, Any]) -> Future[VllmOutput]:
        """Ask for tokens after `ids`.

        Args:
            parameters: of `vllm.SamplingParams`.

        Returns:
            A future, which raises EngineError where the request is refused or the backend fails.
        """
        future: Future[VllmOutput] = Future()
        self._inbox.put((ids, parameters, future))
        if not self.alive:
            self._fail_all()
        return future

    def close(self) -> None:
        """Stop the thread. Requests that are not finished fail."""
        self._inbox.put(None)

    def _own(self, create: Callable[[], VllmBackend], ready: Future[Any]) -> None:
        """Create the backend, and serve requests until the thread is closed or the backend fails."""
        try:
            backend = create()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(backend.config)
        try:
            self._serve(backend)
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
        self._fail_all()
        backend.close()

    def _fail_all(self) -> None:
        """Fail the requests that wait: the thread has stopped."""
        error = EngineError(f"vLLM has stopped: {self._failure or 'it was closed'}")
        with suppress(queue.Empty):
            while True:
                submitted = self._inbox.get_nowait()
                if submitted is not None:
                    submitted[2].set_exception(error)
        for future in self._waiting.values():
            future.set_exception(error)
        self._waiting.clear()

    def _serve(self, backend: VllmBackend) -> None:
        numbers = count()
        while True:
            while not self._waiting or not self._inbox.empty():
                submitted = self._inbox.get()
                if submitted is None:
                    return
                ids, parameters, future = submitted
                name = str(next(numbers))
                try:
                    backend.add(name, ids, parameters)
                except Exception as error:  # whatever it refuses a request with: the others go on
                    future.set_exception(EngineError(f"vLLM refuses: {error}"))
                else:
                    self._waiting[name] = future
            for name, output in backend.step():
                self._waiting.pop(name).set_result(output)


def _read(request_output: Any) -> VllmOutput:
    [completion] = request_output.outputs
    logprobs = [
        {token: logprob.logprob for token, logprob in position.items()} for position in completion.logprobs or ()
    ]
    return VllmOutput(list(completion.token_ids), logprobs)
