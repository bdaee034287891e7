"""One server of llama.cpp, vLLM or SGLang: what it has, how it is asked, and whether it still has what it had.

Which model it serves is looked at again whenever a connection had to be made anew: a text is never continued by another
model under the same name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from mixlm.core.sampling import softmax
from mixlm.engines.base import GenerateRequest, GenerateResponse, Session
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.remote.capabilities import ServerCapabilities, parse_generation, probe_capabilities
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.llamacpp_runs import COMPLETION_PATH, LlamaCppRuns, find_missing
from mixlm.engines.remote.protocols import (
    LlamaCppProtocol,
    OpenAIProtocol,
    ServerProtocol,
    SGLangProtocol,
    cached_tokens,
    is_sglang,
    sglang_context,
)
from mixlm.engines.remote.session_client import SessionConnector, SessionPool, parse_candidates, parse_generate_response
from mixlm.engines.vllm.sampling_params import logprobs_parameters
from mixlm.errors import ConfigError, EngineError, TokenizerError, UnsupportedError, did_you_mean
from mixlm.types import Candidates, Ids

# A server computes the same question with other companions in its batch: what it says of one model differs this much.
_SAME = 0.2
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
PROBE = "The sky is blue, and 12 + 30 = 42."


@dataclass(frozen=True)
class CandidatesResponse:
    """What a server answers. cached: tokens of the prompt that it had read before; None where it does not say."""

    likeliest: Candidates
    cached: int | None


@dataclass(frozen=True)
class TokenizerProbe:
    """What has to be known of a model's tokenizer to try out a server.

    probe: ids of `PROBE`. start: ids to ask something with. character: a token that is whole characters. tokens: the
    bytes of each id. ends: ids that end a text. folder: where it is from, for errors.
    """

    probe: list[int]
    start: list[int]
    character: int
    tokens: Sequence[bytes]
    ends: frozenset[int]
    folder: str


class ModelServer:
    """A server and one model that it has. wanted: the model's name, empty for its only one.

    told: how many of the likeliest tokens it tells at most. homes: sessions that stay with it. served: how it draws by
    itself. line: where it has mixlm's route, on which a text is continued.
    """

    def __init__(self, wire: HttpClient, wanted: str) -> None:
        self.wire = wire
        self.model = wanted
        self.card: dict[str, Any] = {}
        self.props: dict[str, Any] = {}
        self.told = 0
        self.limited = True
        self.reports_cached = False
        self.served: ServerCapabilities | LlamaCppRuns = ServerCapabilities()
        self.texts: SessionPool | None = None
        self.homes: WeakSet[Session] = WeakSet()
        self.ready = False
        self._dialect: ServerProtocol | None = None
        self._reader: TokenizerProbe | None = None
        self._slots: Slots | None = None
        self._room: asyncio.Semaphore | None = None
        self._fingerprint: dict[int, float] = {}
        self._looking = asyncio.Lock()
        self._looks_begun = 0
        self._look = (0, True)  # the last that came to an end: its number, and whether it was the same
        self._wait = 0.0
        self._again = 0.0

    @property
    def dialect(self) -> str:
        """Name of the way it is asked."""
        return self._dialect.name if self._dialect is not None else ""

    @property
    def due(self) -> bool:
        """Whether a server that failed should be looked at again."""
        return time.monotonic() >= self._again

    async def meet(self) -> None:
        """Ask what it has. Raises EngineError, ConfigError or UnsupportedError."""
        self.card = await self._find(self.model)
        self.model = str(self.card["id"])
        # SGLang's has had two names: the second until version 0.5.5, and with a warning since.
        for path in ("/server_info", "/get_server_info") if is_sglang(self.card) else ("/props",):
            answer = await self.wire.ask("GET", path)
            self.props = answer.value if answer.status == 200 and isinstance(answer.value, dict) else {}
            if self.props:
                break

    async def try_out(self, reader: TokenizerProbe, wanted: int) -> None:
        """Find out how it is asked and whether it reads as the tokenizer does. wanted: tokens it should tell.

        Raises EngineError, TokenizerError or UnsupportedError, which names what it lacks.
        """
        self._reader = reader
        await self._compare_tokenizers(reader)
        await self._choose_dialect(reader, wanted)
        self._fingerprint = await self._likeliest_of_probe()
        # Asked the same once more, it should have the beginning in its cache.
        self.reports_cached = bool((await self._ask(reader.probe, 5))[0].cached)
        if isinstance(self._dialect, LlamaCppProtocol):
            lacks = await find_missing(self._llama_run, np.array(reader.probe))
            self.served = LlamaCppRuns(lacks, reader.tokens, reader.ends)
        elif isinstance(self._dialect, SGLangProtocol):
            self.served = ServerCapabilities(SGLangProtocol.missing)
        else:
            self.served = await probe_capabilities(self._complete, reader.probe)
            line = await SessionConnector.found(self.wire.base, self.wire.key, self.wire.limits)
            if line is not None:
                self.wire.closing.append(line.close)
                self.texts = SessionPool(line, self._check)
        self.ready, self._wait = True, 0.0

    def context(self) -> int:
        """Return how many tokens it takes. Raises UnsupportedError when it does not say."""
        if is_sglang(self.card) and (limit := sglang_context(self.card, self.props)) is not None:
            return limit
        if self.card.get("max_model_len"):
            # A question is answered with one token at least, and that has to fit in too.
            return int(self.card["max_model_len"]) - 1
        slot = (self.props.get("default_generation_settings") or {}).get("n_ctx")
        found = slot or (self.card.get("meta") or {}).get("n_ctx")
        if not found:
            raise UnsupportedError(
                "the server does not say how many tokens its context holds", "give it: context = N, beside model"
            )
        return int(found)

    def folder(self) -> Path | None:
        """Return the folder of the tokenizer where it tells its model's path, and this machine has it."""
        from mixlm.models import find_gguf, tokenizer_folder

        told = (self.props.get("tokenizer_path"), self.card.get("root"), self.props.get("model_path"))
        for path in (*told, self.card.get("id")):
            if not isinstance(path, str) or not Path(path).exists():
                continue
            if (Path(path) / "tokenizer.json").is_file():
                return Path(path)
            if (found := find_gguf(path)) is not None:
                return tokenizer_folder(found)
        return None

    def failed(self) -> None:
        """Note that it does not answer. It is looked at again after ever longer times."""
        self.ready = False
        self._wait = min(max(2 * self._wait, _FIRST_WAIT), _LONGEST_WAIT)
        self._again = time.monotonic() + self._wait

    async def likeliest(self, session: Session, ids: Ids, count: int) -> CandidatesResponse:
        """Ask for at least the `count` likeliest tokens after `ids`. Raises EngineError."""
        if self.texts is not None:
            answer = await self.texts.write(session, ids, logprobs_parameters(count))
            return CandidatesResponse(self._known(parse_candidates(answer, self.wire.base)), answer.get("cached"))
        async with self._slot(session, ids) as slot:
            told, anew = await self._ask(ids.tolist(), count, slot)
        await self._check(anew)
        return told

    async def write(self, session: Session, run: GenerateRequest, ends: Sequence[int]) -> GenerateResponse:
        """Let it draw a run by itself. Raises EngineError."""
        if isinstance(self.served, LlamaCppRuns):
            return await self._llama_write(session, run)
        if self.texts is not None:
            parameters, banned = self.served.parameters(run, run.length, ends), self.served.banned(run)
            return parse_generate_response(await self.texts.write(session, run.ids, parameters, banned), self.wire.base)
        answer, anew = await self._complete(self.served.body(run, run.length, ends))
        await self._check(anew)
        return parse_generation(answer, self.wire.base)

    async def _llama_write(self, session: Session, run: GenerateRequest) -> GenerateResponse:
        assert isinstance(self.served, LlamaCppRuns)

        async def ask(body: dict[str, Any]) -> Any:
            async with self._slot(session, run.ids) as slot:
                return await self._llama_run({**body, **({} if slot is None else {"id_slot": slot})})

        async def likeliest(ids: Ids, count: int) -> Candidates:
            return (await self.likeliest(session, ids, count)).likeliest

        return await self.served.write(run, ask, likeliest)

    async def _llama_run(self, body: dict[str, Any]) -> Any:
        value, anew = await self._complete(body, COMPLETION_PATH)
        await self._check(anew)
        return value

    def leave(self, session: Session) -> None:
        """Note that a sequence stays elsewhere from now on."""
        self.homes.discard(session)
        if self.texts is not None:
            self.texts.drop(session)

    async def _check(self, anew: bool = True) -> None:
        """Raise EngineError when a connection was made anew, and it has another model than it had.

        Connections are made many at a time, when replies begin together: what begins to be looked at from now on counts
        for all that wait by then.
        """
        if not anew:
            return
        wanted = self._looks_begun + 1
        async with self._looking:
            if self._look[0] < wanted:
                self._looks_begun += 1
                number = self._looks_begun
                self._look = (number, await self.still_the_same())
            same = self._look[1]
        if not same:
            raise EngineError(f"the server {self.wire.base} has another model now, under the name {self.model}")

    async def alive(self) -> bool:
        """Whether it answers, with the model that it had."""
        try:
            answer = await self.wire.ask("GET", "/v1/models", seconds=2.0)
            return bool(answer.status == 200 and await self.still_the_same())
        except EngineError:
            return False

    async def still_the_same(self) -> bool:
        """Whether it has the model that it had: the same words of itself, and the same answer to a question."""
        try:
            card = await self._find(self.model)
        except (ConfigError, UnsupportedError):
            return False
        return self._same_card(card) and self._same_answer(await self._likeliest_of_probe())

    def has_what(self, other: ModelServer) -> bool:
        """Whether two servers have one model, as far as can be asked."""
        return self._same_answer(other._fingerprint)

    def _same_card(self, card: dict[str, Any]) -> bool:
        return all(card.get(key) == self.card.get(key) for key in ("root", "max_model_len", "meta"))

    def _same_answer(self, now: dict[int, float]) -> bool:
        then = self._fingerprint
        return 0.5 * sum(abs(now.get(i, 0) - then.get(i, 0)) for i in {*now, *then}) < _SAME

    @asynccontextmanager
    async def _slot(self, session: Session, ids: Ids) -> AsyncIterator[int | None]:
        """Hold a place of llama.cpp's for a sequence, so that its cache is there when it is asked again.

        Left to itself, the server would put sequences with a common beginning into one place, in turn.
        """
        if self._slots is None or self._room is None:
            yield None
            return
        async with self._room:
            found = self._slots.take(session, ids)
            assert found is not None  # no more are at work than there are places
            try:
                yield found[0]
            finally:
                self._slots.free(found[0])

    async def _ask(self, ids: list[int], count: int, slot: int | None = None) -> tuple[CandidatesResponse, bool]:
        assert self._dialect is not None
        anew = False
        place = {} if slot is None else {"id_slot": slot}
        for body in self._dialect.bodies(ids, count):
            value, new = await self._complete({**body, **place}, self._dialect.path)
            anew |= new
            try:
                found = self._dialect.read(value)
            except (TypeError, LookupError, ValueError, AttributeError):
                raise EngineError(f"{self.wire.base} gives no answer: {str(value)[:200]}") from None
            if found is not None:
                return CandidatesResponse(self._known(found), cached_tokens(value)), anew
        raise EngineError(f"{self.wire.base} tells no probabilities of {self.model}")

    async def _complete(self, body: dict[str, Any], path: str = "/v1/completions") -> tuple[Any, bool]:
        """Ask for a completion. Also tells whether a connection was made for it."""
        answer = await self.wire.ask("POST", path, {**body, "model": self.model})
        if answer.status != 200:
            raise EngineError(f"{self.wire.base} refuses ({answer.status}): {_message(answer.value)}")
        return answer.value, answer.anew

    def _known(self, found: Candidates) -> Candidates:
        """Return what is told of without rows behind the last token, which are padding."""
        assert self._reader is not None
        here = found.ids < len(self._reader.tokens)
        return Candidates(found.ids[here], found.logprobs[here])

    async def _find(self, wanted: str) -> dict[str, Any]:
        """Return what the server says of the model that is asked for, or of its only one."""
        answer = await self.wire.ask("GET", "/v1/models")
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

    async def _compare_tokenizers(self, reader: TokenizerProbe) -> None:
        for body in ({"model": self.model, "prompt": PROBE, "add_special_tokens": False}, {"content": PROBE}):
            answer = await self.wire.ask("POST", "/tokenize", body)
            theirs = answer.value.get("tokens") if answer.status == 200 and isinstance(answer.value, dict) else None
            if isinstance(theirs, list) and theirs:
                if theirs != reader.probe:
                    raise TokenizerError(
                        f"the tokenizer in {reader.folder} and the server {self.wire.base} read a text differently",
                        "give the folder of the model that the server has",
                    )
                return

    async def _choose_dialect(self, reader: TokenizerProbe, wanted: int) -> None:
        """Try which dialect the server speaks, and how many tokens it tells."""
        dialects: tuple[ServerProtocol, ...] = (LlamaCppProtocol(reader.character), OpenAIProtocol())
        if is_sglang(self.card):
            dialects = (SGLangProtocol(self.model if self.card.get("parent") else ""),)
        said = ""
        for dialect in dialects:
            for count in dict.fromkeys((wanted, 20, 5)):
                self._dialect = dialect
                try:
                    found, _ = await self._ask(reader.start, count)
                except EngineError as error:
                    said = error.message
                    continue
                self.told = len(found.likeliest.ids)
                if self.told < min(count, 5):
                    said = f"it tells {self.told} tokens where {count} are asked for"
                    continue
                self.limited = not self.told >= count > 20
                self._reserve_slots()
                return
        raise UnsupportedError(
            f"{self.wire.base} does not tell the likeliest next tokens by their ids: {said}",
            "servers that do: llama.cpp's, SGLang's, and vLLM's with --max-logprobs 80",
        )

    def _reserve_slots(self) -> None:
        """Take llama.cpp's places for sequences; the last of several is for what is asked beside them."""
        total = int(self.props.get("total_slots") or 0)
        if isinstance(self._dialect, LlamaCppProtocol) and total:
            self._slots = Slots(max(total - 1, 1))
            self._room = asyncio.Semaphore(max(total - 1, 1))

    async def _likeliest_of_probe(self) -> dict[int, float]:
        assert self._reader is not None
        total = int(self.props.get("total_slots") or 0)
        found = (await self._ask(self._reader.probe, 5, total - 1 if self._slots and total else None))[0].likeliest
        order = np.argsort(-found.logprobs)[:5]
        return dict(zip(found.ids[order].tolist(), softmax(found.logprobs[order]).tolist(), strict=True))


def _message(value: Any) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
