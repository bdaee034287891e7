"""A model that is a table: small enough to enumerate, real enough to run every strategy. For tests and docs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from mixlm.core.sampling import Transform
from mixlm.engines.base import Engine, GenerateRequest, GenerateResponse, Session
from mixlm.engines.spec import EngineSpec
from mixlm.errors import TokenizerError, UnsupportedError
from mixlm.tokenization.chat_template import PromptEncoder
from mixlm.tokenization.incremental import Encoded
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Logits, Message, Sampling

Table = Callable[[tuple[int, ...]], Logits]

_WORDS = (
    "the", "and", "of", "to", "in", "one", "two", "river", "bird", "stone", "light", "tree", "cloud", "sings", "falls",
    "turns", "under", "over",
)  # fmt: skip
WORD_TOKENS = tuple([f" {word}".encode() for word in _WORDS] + [bytes([b]) for b in range(256)])


def random_table(vocab: int, seed: int, order: int = 2, scale: float = 1.5) -> Table:
    """Return a table of normal logits that depend on the last `order` ids."""

    def table(context: tuple[int, ...]) -> Logits:
        rng = np.random.default_rng([seed, *context[-order:]])
        return rng.normal(scale=scale, size=vocab)

    return table


def wordy_table(seed: int) -> Table:
    """Return a random table over `WORD_TOKENS` that prefers words to bare bytes, for something to look at."""
    vocab = len(WORD_TOKENS) + 2
    table = random_table(vocab, seed)
    bias = np.zeros(vocab)
    bias[len(_WORDS) : vocab - 1] = -12
    return lambda context: table(context) + bias


class LongestMatch:
    """Encodes bytes by taking the longest token that fits, from left to right."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = {token: i for i, token in reversed(list(enumerate(tokens))) if token}
        self._longest = max(map(len, self._ids))

    def encode(self, data: bytes) -> Encoded:
        """Encode any bytes; a choice made with the longest token's length in sight is final."""
        ids: list[int] = []
        at = stable_ids = stable_bytes = 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                found = self._ids.get(data[at : at + length])
                if found is not None:
                    break
            else:
                raise TokenizerError(f"the toy vocabulary has no token for byte {data[at]:#04x}")
            final = at + self._longest <= len(data)
            ids.append(found)
            at += length
            if final:
                stable_ids, stable_bytes = len(ids), at
        return Encoded(ids, stable_ids, stable_bytes)


class ToyEngine(Engine):
    """A table over a given vocabulary. The last id is end-of-text, the one before it begins every prompt.

    tokens: bytes of the other ids. table: logits (len(tokens) + 2,) for a context of ids; random when left out.
    writes: whether it draws by itself where it can, as servers do, with random numbers of its own.
    """

    def __init__(
        self,
        tokens: Sequence[bytes] = WORD_TOKENS,
        table: Table | None = None,
        *,
        name: str = "toy",
        seed: int = 0,
        context_length: int = 4096,
        samples_itself: bool = False,
    ) -> None:
        begin, end = len(tokens), len(tokens) + 1
        size = len(tokens) + 2
        self.name = name
        names = {begin: "<begin>", end: "<end>"}
        self.vocabulary = Vocabulary.of(
            dict(enumerate(tokens)), size, end_ids=[end], special_ids=[begin, end], names=names
        )
        self.encoder = LongestMatch(tokens)
        self.prompts = PromptEncoder(self.encoder, {name: i for i, name in names.items()}, render, begin=[begin])
        self.tokenizer_info = {"family": "bytes", "normaliser": "none", "leading space": "never", "template": "its own"}
        self.context_length = context_length
        self.table = table or random_table(size, seed)
        self._writes = samples_itself

    @classmethod
    def from_spec(cls, spec: EngineSpec) -> ToyEngine:
        """Build the toy that `toy:SEED` names. Raises UnsupportedError for an adapter, which no table can have."""
        if spec.adapter is not None:
            raise UnsupportedError(f"{spec.model} is a toy, which takes no adapter", "leave it out")
        digits = re.sub(r"\D", "", spec.model) or "0"
        toy = cls(table=wordy_table(int(digits)), name=spec.model)
        toy.prompts.system = spec.system
        return toy

    def session(self) -> ToySession:
        """Begin a sequence."""
        return ToySession(self)

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it was told to; it cannot look back, as penalties do."""
        return self._writes and not sampling.has_penalties


def render(messages: Sequence[Message]) -> str:
    """Render a prompt: who says what, a line each."""
    return "<begin>" + "".join(f"{one.role}: {one.content}\n" for one in messages)


class ToySession(Session):
    """A toy's cache is the ids themselves."""

    def __init__(self, engine: ToyEngine) -> None:
        super().__init__(engine.context_length)
        self._table = engine.table
        self._ends = engine.vocabulary.end_ids
        self._context: list[int] = []

    def _truncate(self, length: int) -> int:
        del self._context[length:]
        return length

    def _forward(self, ids: Ids, last: int) -> Logits:
        self._context += ids.tolist()
        end = len(self._context)
        rows = [self._table(tuple(self._context[: at + 1])) for at in range(end - last, end)]
        return np.array(rows, dtype=np.float32)

    def generate(self, run: GenerateRequest) -> GenerateResponse:
        """Draw token by token, by inverting the cumulative sum."""
        transform, random = Transform(run.sampling, run.banned), np.random.default_rng(run.seed)
        start, written = time.perf_counter(), GenerateResponse([], [])
        while len(written.ids) < run.max_tokens and not self._ends & {*written.ids}:
            context = (*run.ids.tolist(), *written.ids)
            law = transform(np.asarray(self._table(context), dtype=np.float32))
            at = int(np.searchsorted(np.cumsum(np.exp(law.logprobs)), random.random()))
            at = min(at, len(law.ids) - 1)
            written.ids.append(int(law.ids[at]))
            written.logprobs.append(float(law.logprobs[at]))
        self.record_generation(run.ids, written, time.perf_counter() - start)
        self._context = [*run.ids.tolist(), *written.ids]
        return written
