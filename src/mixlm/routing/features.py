"""Cheap features of the text so far: how often each class of characters occurs in its last bytes.

They are a function of these bytes alone. In particular they do not depend on which member generated them: weights that
did would not be a function of the state, and the mixture would not sample from the average.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixlm.types import Floats

WINDOWS = (16, 128, 1024, 8192)
FEATURE_TAIL = max(WINDOWS)

_CLASSES = (
    b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789", b" ", b"\n\r", b"\t", b".", b",", b";",
    b":", b"?!", b"'", b'"`', b"()", b"[]{}", b"<>", b"=", b"+-*/%", b"_", b"#@&$|\\^~",
    bytes(range(0x80, 0x100)),
)  # fmt: skip
_OTHER = len(_CLASSES)
_CLASS_OF = np.full(256, _OTHER, dtype=np.int64)
for _number, _bytes in enumerate(_CLASSES):
    _CLASS_OF[list(_bytes)] = _number

# Square roots of each class's share of each window, the class of the last byte, how full each window is, a constant.
FEATURES = len(WINDOWS) * (_OTHER + 1) + (_OTHER + 1) + len(WINDOWS) + 1


def features(text: bytes, positions: npt.NDArray[np.int64]) -> Floats:
    """Return the features of `text[:position]` for each position: float64 (positions, FEATURES)."""
    classes = _CLASS_OF[np.frombuffer(text, dtype=np.uint8)]
    counts = (
        _counts_at_end(classes) if len(positions) == 1 and positions[0] == len(text) else _counts(classes, positions)
    )
    last = np.zeros((len(positions), _OTHER + 1))
    has_last = np.flatnonzero(positions > 0)
    last[has_last, classes[positions[has_last] - 1]] = 1
    lengths = [np.maximum(np.minimum(positions, window), 1)[:, None] for window in WINDOWS]
    # The square root magnifies rare classes: one bracket in a window says more than another letter.
    shares = [np.sqrt(count / length) for count, length in zip(counts, lengths, strict=True)]
    filled = [np.minimum(positions / window, 1.0)[:, None] for window in WINDOWS]
    return np.hstack([*shares, last, *filled, np.ones((len(positions), 1))])


def _counts(classes: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> list[Floats]:
    """Count each class in each window before each position: for each window an array (positions, classes)."""
    marks = np.zeros((len(classes) + 1, _OTHER + 1))
    marks[np.arange(1, len(classes) + 1), classes] = 1
    totals = np.cumsum(marks, axis=0)
    return [totals[positions] - totals[np.maximum(positions - window, 0)] for window in WINDOWS]


def _counts_at_end(classes: npt.NDArray[np.int64]) -> list[Floats]:
    """Return the same for the end of the text alone, as decoding needs it at every token."""
    ends = [classes[max(len(classes) - window, 0) :] for window in WINDOWS]
    return [np.bincount(end, minlength=_OTHER + 1)[None].astype(np.float64) for end in ends]
