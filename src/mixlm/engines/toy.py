"""A model that is a table: small enough to enumerate, real enough to run every strategy. For tests and docs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np

from mixlm.core.sampling import Transform
from mixlm.engines.base import Engine, EngineSpec, Session, TextInterface
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.errors import ConfigError, TokenizerError, UnsupportedError
from mixlm.tokenization.incremental import Encoded
from mixlm.tokenization.prompt_encoder import PLAIN_FORM, PromptEncoder, PromptForm
from mixlm.tokenization.tool_calls import plain_messages
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Logits, Message, Sampling

_FLOAT16 = (-65504.0, 65504.0)

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
        several = sorted((token for token in self._ids if len(token) > 1), key=len, reverse=True)
        self._pattern = re.compile(b"|".join([*map(re.escape, several), b"."]), re.DOTALL)

    def encode(self, data: bytes) -> Encoded:
        """Encode any bytes; a token is stable once as many bytes follow as the longest token has."""
        tokens: list[bytes] = self._pattern.findall(data)
        ids = [self._ids.get(token, -1) for token in tokens]
        if -1 in ids:
            raise TokenizerError(f"the toy vocabulary has no token for byte {tokens[ids.index(-1)][0]:#04x}")
        stable_ids, stable_bytes = len(ids), len(data)
        while stable_ids:
            start = stable_bytes - len(tokens[stable_ids - 1])
            if start + self._longest <= len(data):
                break
            stable_ids, stable_bytes = stable_ids - 1, start
        return Encoded(ids, stable_ids, stable_bytes)


def toy_text(tokens: Sequence[bytes], size: int, begin: int, notes: tuple[str, ...] = ()) -> TextInterface:
    """Return a text interface over given tokens, encoded by `LongestMatch`.

    Args:
        tokens: the bytes of the first ids.
        size: of the vocabulary.
        begin: the id that begins every prompt; the next one is end of text.
        notes: what a user should know about the model.
    """
    special = {begin: "<begin>", begin + 1: "<end>"}
    encoder = LongestMatch(tokens)
    prompts = PromptEncoder(encoder, {name: i for i, name in special.items()}, render, begin=[begin])
    return TextInterface(
        Vocabulary.of(dict(enumerate(tokens)), size, [begin + 1], special, special),
        encoder,
        prompts,
        tokenizer_info={"family": "bytes", "normaliser": "none", "leading space": "never", "template": "its own"},
        notes=notes,
    )


class ToyEngine(Engine):
    """A table over a given vocabulary. The last id is end of text, the one before it begins every prompt.

    on_forward: called with the new ids, int64, and `last` before each forward pass of a session, or None. It may count,
    wait or raise, and be set at any time; as a `staticmethod` also on the class.

    Args:
        tokens: bytes of the other ids.
        table: logits (len(tokens) + 2,) for a context of ids; random by default.
        name: of the model.
        seed: of the random table.
        context_length: in tokens.
        samples_itself: whether it samples itself where it can, as servers do, with its own random number generator.
    """

    on_forward: Callable[[Ids, int], None] | None = None
    hidden_size: int
    details = MappingProxyType({"engine": "toy"})

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
        size = len(tokens) + 2
        super().__init__(name, toy_text(tokens, size, len(tokens)), context_length)
        self.table = table or random_table(size, seed)
        self.hidden_size = size  # the hidden state of a table is its row
        self._samples_itself = samples_itself

    def session(self) -> ToySession:
        """Begin a sequence."""
        return ToySession(self)

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it was built to; it supports no penalties then."""
        return self._samples_itself and not sampling.has_penalties


def load(spec: EngineSpec) -> ToyEngine:
    """Build the toy that `toy:SEED` names.

    Raises:
        ConfigError: Another engine is named.
        UnsupportedError: There is an adapter.
    """
    if spec.engine not in ("auto", "toy"):
        raise ConfigError(f"engine is {spec.engine!r}, and {spec.model} is a toy, its own engine", "leave it out")
    if spec.adapter is not None:
        raise UnsupportedError(f"{spec.model} is a toy, which takes no adapter", "leave it out")
    digits = re.sub(r"\D", "", spec.model) or "0"
    toy = ToyEngine(table=wordy_table(int(digits)), name=spec.model)
    toy.prompts.system = spec.system
    return toy


def render(messages: Sequence[Message], form: PromptForm = PLAIN_FORM) -> str:
    """Render a prompt: one line a message, with its role."""
    lines = "".join(f"{message.role}: {message.content}\n" for message in plain_messages(messages, form.tools))
    return "<begin>" + (lines.removesuffix("\n") if form.continue_final_message else lines)


class ToySession(Session):
    """A toy's KV cache is the ids themselves."""

    def __init__(self, engine: ToyEngine) -> None:
        super().__init__(engine.context_length)
        self._engine = engine

    def truncate(self, length: int) -> int:
        """Return `length`: it keeps nothing but the ids."""
        return length

    def forward(self, ids: Ids, last: int) -> Logits:
        """Look up the logits of the last positions of `ids`, after those that are cached."""
        if self._engine.on_forward is not None:
            self._engine.on_forward(ids, last)
        context = (*self._cached.ids.tolist(), *ids.tolist())
        length = len(context)
        rows = [self._engine.table(context[:end]) for end in range(length - last + 1, length + 1)]
        if self.keeps_hidden:
            self.hidden_states = np.clip(rows, *_FLOAT16).astype(np.float16)
        return np.array(rows, dtype=np.float32)

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Sample token by token, by inverting the cumulative distribution."""
        transform, rng = Transform(request.sampling, request.banned), np.random.default_rng(request.seed)
        ends = self._engine.vocabulary.end_ids
        start, response = time.perf_counter(), GenerateResponse([], [])
        while len(response.ids) < request.max_tokens and not ends & {*response.ids}:
            context = (*request.ids.tolist(), *response.ids)
            distribution = transform(np.asarray(self._engine.table(context), dtype=np.float32))
            index = int(np.searchsorted(np.cumsum(np.exp(distribution.logprobs)), rng.random()))
            index = min(index, len(distribution.ids) - 1)
            response.ids.append(int(distribution.ids[index]))
            response.logprobs.append(float(distribution.logprobs[index]))
        self.record_generation(request.ids, response, time.perf_counter() - start)
        return response
