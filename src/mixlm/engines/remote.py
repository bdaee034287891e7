"""A member behind a server with `/v1/completions`: llama.cpp's, vLLM's, or one that speaks as they do.

Every question is a request for one token with the likeliest N, by ids. The server's own prefix cache does the catching
up. What it can do is tried out when the member is loaded, and refused by name when something is missing. Which model
it serves is checked again whenever a connection had to be made anew: a text is never continued by another model.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.engines.base import Reply, Request, Run, Session, Written
from mixlm.engines.dialects import Dialect, LlamaCpp, OpenAI
from mixlm.engines.partial import PartialEngine, PartialSession
from mixlm.engines.runs import run_parameters
from mixlm.engines.served import Served, try_out, written_by
from mixlm.engines.session import Connection, Line, likeliest_in_session, written_in_session
from mixlm.engines.spec import EngineSpec
from mixlm.engines.together import in_threads
from mixlm.engines.tokenizer import Read, load_tokenizer
from mixlm.engines.wire import Limits, Wire
from mixlm.errors import ConfigError, EngineError, TokenizerError, UnsupportedError, did_you_mean
from mixlm.records import Sampling
from mixlm.sampling import Candidates, Ids, softmax

_PROBE = "The sky is blue, and 12 + 30 = 42."
# A server computes the same question with other companions in its batch: what it says of one model differs this much.
_SAME = 0.2
_PLAIN = Sampling(temperature=1.0, top_k=0)


class RemoteEngine(PartialEngine):
    """A model behind `http://host:port` or `https://host:port`, `#name` behind it where the server has several.

    tokenizer: folder of the model's tokenizer; where the server tells the path of its model and this machine has it,
    that is taken when the folder is left out.

    Raises EngineError when the server does not answer, UnsupportedError when it lacks something, by name, ConfigError
    when it has another model or the key is not there, TokenizerError when the tokenizer is another's.
    """

    def __init__(self, spec: EngineSpec, folder: Path | None, limits: Limits | None = None) -> None:
        base, _, wanted = spec.model.partition("#")
        base = base.rstrip("/").removesuffix("/v1")
        self.limits = limits or Limits(answer=spec.timeout)
        self.wire = Wire(base, _key(spec), self.limits)
        self._closing = weakref.finalize(self, self.wire.close)
        card = self._card(wanted)
        self.model = str(card["id"])
        self.name = spec.name or self.model.rpartition("/")[2].removesuffix(".gguf")
        self.device = base  # members behind different servers work at once
        self._model_card = card
        props = self._props()
        folder = folder or _local_folder(card, props)
        if folder is None:
            raise ConfigError(
                f"the tokenizer of {self.name} at {base} is not known",
                "give its folder: tokenizer = PATH, beside model",
            )
        self._read_tokenizer(spec, folder, card)
        self.context_length = spec.context or _context(card, props)
        self._choose_dialect(spec)
        self._threads = ThreadPoolExecutor(self.limits.connections)
        self._probe_ids = self.encoder.encode(_PROBE.encode()).ids
        self._fingerprint = self._likeliest_of_probe()
        self.served = Served()
        self.line: Line | None = None
        if isinstance(self.dialect, OpenAI):
            self.served = try_out(self._complete, self._probe_ids)
            self.line = self._line(spec)
        self.details = {**self.details, **self.served.details(), **({"sessions": "yes"} if self.line else {})}

    def session(self) -> RemoteSession:
        """Begin a sequence. The server keeps nothing of it but what its prefix cache holds."""
        return RemoteSession(self)

    def answer(self, requests: Sequence[tuple[Session, Request]]) -> list[Reply]:
        """Send questions of several sequences at once."""
        return in_threads(self._threads, super().answer, requests)

    def writes(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether the server draws by itself what the options mean, and tells what it drew."""
        return self.served.writes(sampling, banned)

    def write(self, run: Run) -> Written:
        """Let the server draw up to `length` tokens."""
        answer, anew = self._complete(self.served.body(run, *self.reach(run)))
        self.check(anew)
        return written_by(answer, self.wire.base)

    def reach(self, run: Run) -> tuple[int, list[int]]:
        """Return how many tokens of a run the context has room for, and the ids that end it."""
        return min(run.length, self.context_length + 1 - len(run.ids)), sorted(self.vocabulary.ends)

    def check(self, anew: bool) -> None:
        """Raise EngineError when a connection was made anew, and the server has another model than it had."""
        if anew and not self._still_the_same():
            raise EngineError(f"the server {self.wire.base} has another model now, under the name {self.model}")

    def alive(self) -> bool:
        """Whether the server answers, with the model that it had."""
        try:
            return bool(self.wire.get("/v1/models", seconds=2.0).status == 200 and self._still_the_same())
        except EngineError:
            return False

    def likeliest(self, ids: Ids, count: int) -> Candidates:
        """Ask for at least the `count` likeliest tokens after `ids`."""
        found, anew = self._ask(ids, count)
        self.check(anew)
        return found

    def _ask(self, ids: Ids, count: int) -> tuple[Candidates, bool]:
        anew = False
        for body in self.dialect.bodies(ids, count):
            value, new = self._complete(body)
            anew |= new
            try:
                found = self.dialect.read(value)
            except (TypeError, LookupError, ValueError, AttributeError):
                raise EngineError(f"{self.wire.base} gives no answer: {str(value)[:200]}") from None
            if found is not None:
                return self.known(found), anew
        raise EngineError(f"{self.wire.base} tells no probabilities of {self.model}")

    def known(self, found: Candidates) -> Candidates:
        """Return what a server tells without rows behind the last token, which are padding."""
        here = found.ids < self.vocabulary.size
        return Candidates(found.ids[here], found.logprobs[here])

    def _line(self, spec: EngineSpec) -> Line | None:
        """Return how to open sessions, where the server has mixlm's route and this machine what it takes to use it."""
        if find_spec("websockets") is None:
            return None
        line = Line(self.wire.base, _key(spec), self.limits.connect, self.limits.answer)
        try:
            line.open().close()
        except EngineError:
            return None
        return line

    def _complete(self, body: dict[str, Any]) -> tuple[Any, bool]:
        """Ask for a completion. Also tells whether a connection was made for it."""
        answer = self.wire.post("/v1/completions", {**body, "model": self.model})
        if answer.status != 200:
            raise EngineError(f"{self.wire.base} refuses ({answer.status}): {_message(answer.value)}")
        return answer.value, answer.anew

    def _card(self, wanted: str) -> dict[str, Any]:
        """Return what the server says of the model that is asked for, or of its only one."""
        answer = self.wire.get("/v1/models")
        if answer.status in (401, 403):
            raise ConfigError(
                f"{self.wire.base} asks for a key (status {answer.status})",
                "name the environment variable that holds it: key_env = NAME, beside model",
            )
        try:
            cards = {str(one["id"]): one for one in answer.value["data"]}
        except (TypeError, LookupError):
            raise UnsupportedError(
                f"{self.wire.base} has no /v1/models (status {answer.status})", "give the URL in front of /v1"
            ) from None
        if not wanted and len(cards) == 1:
            return dict(next(iter(cards.values())))
        if wanted not in cards:
            names = ", ".join(cards) or "none"
            asked = f"no model {wanted!r}" if wanted else "several models or none"
            raise ConfigError(
                f"{self.wire.base} has {asked}; it has: {names}",
                did_you_mean(wanted, cards) or "put #NAME behind the URL",
            )
        return dict(cards[wanted])

    def _props(self) -> dict[str, Any]:
        """Return what llama.cpp's server says of itself; nothing of other servers."""
        answer = self.wire.get("/props")
        return answer.value if answer.status == 200 and isinstance(answer.value, dict) else {}

    def _read_tokenizer(self, spec: EngineSpec, folder: Path, card: dict[str, Any]) -> None:
        tokenizer = load_tokenizer(str(folder), self.name)
        rows = max(len(tokenizer), int((card.get("meta") or {}).get("n_vocab") or 0))
        read = Read.of(tokenizer, self.name, str(folder))
        self.notes = tuple(read.give(self, tokenizer, replace(spec, name=self.name), rows, ()))
        self.prepare()
        ours = self.encoder.encode(_PROBE.encode()).ids
        for body in ({"model": self.model, "prompt": _PROBE, "add_special_tokens": False}, {"content": _PROBE}):
            answer = self.wire.post("/tokenize", body)
            theirs = answer.value.get("tokens") if answer.status == 200 and isinstance(answer.value, dict) else None
            if isinstance(theirs, list) and theirs:
                if theirs != ours:
                    raise TokenizerError(
                        f"the tokenizer in {folder} and the server {self.wire.base} read a text differently",
                        "give the folder of the model that the server has",
                    )
                return

    def _choose_dialect(self, spec: EngineSpec) -> None:
        """Try which dialect the server speaks, and how many tokens it tells."""
        dialects: tuple[Dialect, ...] = (LlamaCpp(self.whole_character()), OpenAI())
        ids, said = np.array(self.encoder.encode(b"A").ids), ""
        for dialect in dialects:
            for count in dict.fromkeys((spec.candidates + self.spare, 20, 5)):
                self.dialect = dialect
                try:
                    found, _ = self._ask(ids, count)
                except EngineError as error:
                    said = error.message
                    continue
                told = len(found.ids)
                if told < min(count, 5):
                    said = f"it tells {told} tokens where {count} are asked for"
                    continue
                self.most = None if told >= count > 20 else told
                self.spare = min(self.spare, told // 5)
                self.candidates = min(spec.candidates, told - self.spare)
                self.details = {"engine": dialect.name, "device": self.wire.base, "dtype": "the server's"}
                return
        raise UnsupportedError(
            f"{self.wire.base} does not tell the likeliest next tokens by their ids: {said}",
            "servers that do: llama.cpp's, and vLLM's with --max-logprobs 80",
        )

    def _likeliest_of_probe(self) -> dict[int, float]:
        found, _ = self._ask(np.array(self._probe_ids), 5)
        order = np.argsort(-found.logprobs)[:5]
        return dict(zip(found.ids[order].tolist(), softmax(found.logprobs[order]).tolist(), strict=True))

    def _still_the_same(self) -> bool:
        """Whether the server has the model that it had: the same words of itself, and the same answer to a question."""
        try:
            card = self._card(self.model)
        except ConfigError:
            return False
        if any(card.get(key) != self._model_card.get(key) for key in ("root", "max_model_len", "meta")):
            return False
        now, then = self._likeliest_of_probe(), self._fingerprint
        return 0.5 * sum(abs(now.get(i, 0) - then.get(i, 0)) for i in {*now, *then}) < _SAME


class RemoteSession(PartialSession):
    """One sequence on a server, which is told all of it at every question; where it has sessions, what is new."""

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__(engine)
        self._engine = engine
        self._connection: Connection | None = None

    def write(self, run: Run) -> Written:
        """Let the server write."""
        engine, start = self._engine, time.perf_counter()
        if engine.line is None:
            written = engine.write(run)
        else:
            served = engine.served
            answer = self._continue(run.ids, served.parameters(run, *engine.reach(run)), served.banned(run))
            written = written_in_session(answer, engine.wire.base)
        self.wrote(run.ids, written, time.perf_counter() - start)
        return written

    def forget(self) -> None:
        """Start anew, and let the server's session go."""
        super().forget()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _likeliest(self, ids: Ids, count: int) -> Candidates:
        if self._engine.line is None:
            return self._engine.likeliest(ids, count)
        answer = self._continue(ids, run_parameters(_PLAIN, 0, 1) | {"logprobs": count})
        return self._engine.known(likeliest_in_session(answer, self._engine.wire.base))

    def _continue(self, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Write on in the server's session; in a new one where the connection is gone, which it may be after a rest."""
        if self._connection is not None:
            try:
                return self._connection.write(ids, parameters, banned)
            except EngineError:
                self._connection = None
        assert self._engine.line is not None
        connection = self._engine.line.open()
        self._engine.check(anew=True)
        answer = connection.write(ids, parameters, banned)
        self._connection = connection
        weakref.finalize(self, connection.close)
        return answer


def _key(spec: EngineSpec) -> str | None:
    if spec.key_env is None:
        return None
    key = os.environ.get(spec.key_env)
    if not key:
        raise ConfigError(f"the environment variable {spec.key_env} is not set, and key_env names it")
    return key


def _local_folder(card: dict[str, Any], props: dict[str, Any]) -> Path | None:
    """Return the folder of the tokenizer where the server tells its model's path, and this machine has it."""
    from mixlm.models import find_gguf, tokenizer_folder

    for path in (card.get("root"), props.get("model_path"), card.get("id")):
        if not isinstance(path, str) or not Path(path).exists():
            continue
        if (Path(path) / "tokenizer.json").is_file():
            return Path(path)
        if (found := find_gguf(path)) is not None:
            return tokenizer_folder(found)
    return None


def _context(card: dict[str, Any], props: dict[str, Any]) -> int:
    """Return how many tokens the server takes. Raises UnsupportedError when it does not say."""
    slot = (props.get("default_generation_settings") or {}).get("n_ctx")
    found = card.get("max_model_len") or slot or (card.get("meta") or {}).get("n_ctx")
    if not found:
        raise UnsupportedError(
            "the server does not say how many tokens its context holds", "give it: context = N, beside model"
        )
    return int(found)


def _message(value: Any) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
