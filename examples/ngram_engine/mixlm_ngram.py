"""An engine for mixlm: an n-gram model over the bytes of a text file. `ngram:FILE` names it."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from mixlm.engines.base import Engine, Session
from mixlm.engines.toy import toy_text
from mixlm.errors import ModelNotFoundError, UnsupportedError

ORDER = 5  # bytes of context
BEGIN, END = 256, 257


def load(spec):
    """Read the file and count. mixlm calls this for a member whose engine is `ngram`."""
    if spec.adapter is not None:
        raise UnsupportedError(f"{spec.model} takes no adapter", "leave it out")
    path = Path(spec.model.removeprefix("ngram:"))
    if not path.is_file():
        raise ModelNotFoundError(f"there is no text file {path}", "name one: ngram:FILE")
    engine = NgramEngine(spec.name or path.stem, path.read_bytes())
    engine.prompts.system = spec.system
    return engine


class NgramEngine(Engine):
    """Mixes the counts after the last 0 to `ORDER` bytes; a longer context counts for more."""

    def __init__(self, name, corpus):
        tokens = [bytes([byte]) for byte in range(256)]
        super().__init__(name, toy_text(tokens, END + 1, begin=BEGIN), context_length=1 << 20)
        self.details = {"engine": "n-gram"}
        self.counts = defaultdict(Counter)
        symbols = [*corpus, END]
        for i, symbol in enumerate(symbols):
            for length in range(min(ORDER, i) + 1):
                self.counts[bytes(corpus[i - length : i])][symbol] += 1
        self.weights_bytes = sum(16 * len(counter) for counter in self.counts.values())

    def session(self):
        """Begin a sequence."""
        return NgramSession(self)

    def logits(self, ids):
        """Return the log-probabilities after some ids: float32 (258,)."""
        probs = np.full(END + 1, 1 / (END + 1))
        context = bytes(int(i) for i in ids[-ORDER:] if i < BEGIN)
        for length in range(len(context) + 1):
            counter = self.counts.get(context[len(context) - length :], {})
            if total := sum(counter.values()):
                probs *= 1 / (1 + total)
                probs[list(counter)] += np.array(list(counter.values())) / (1 + total)
        return np.log(probs).astype(np.float32)


class NgramSession(Session):
    """One sequence. Its KV cache is the ids themselves."""

    def __init__(self, engine):
        super().__init__(engine.context_length)
        self.engine, self.ids = engine, []

    def truncate(self, length):
        """Keep the first `length` ids."""
        del self.ids[length:]
        return length

    def forward(self, ids, last):
        """Append ids; return the logits after each of the last ones: float32 (last, 258)."""
        self.ids += ids.tolist()
        ends = range(len(self.ids) - last + 1, len(self.ids) + 1)
        return np.stack([self.engine.logits(self.ids[:end]) for end in ends])
