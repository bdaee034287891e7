"""Cheap features of a text so far: what kind of characters it is made of, lately.

They are a function of the last bytes alone. In particular they do not know which member wrote them: weights that did
would no longer be a function of the state, and the mixture would follow another law than the average.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixlm.sampling import Floats

WINDOWS = (32, 1024)
TAIL = max(WINDOWS)

_CLASSES = (
    b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789", b" ", b"\n\r", b"\t", b".", b",", b";",
    b":", b"?!", b"'", b'"`', b"()", b"[]{}", b"<>", b"=", b"+-*/%", b"_", b"#@&$|\\^~",
    bytes(range(0x80, 0x100)),
)  # fmt: skip
_OTHER = len(_CLASSES)
_CLASS_OF = np.full(256, _OTHER, dtype=np.int64)
for _number, _members in enumerate(_CLASSES):
    _CLASS_OF[list(_members)] = _number

# Square roots of each class's share of each window, the class of the last byte, how much text there is, and a constant.
FEATURES = len(WINDOWS) * (_OTHER + 1) + (_OTHER + 1) + len(WINDOWS) + 1


def features(text: bytes, places: npt.NDArray[np.int64]) -> Floats:
    """Return the features of `text[:place]` for each place: float64 (places, FEATURES). O(len(text) + places)."""
    classes = _CLASS_OF[np.frombuffer(text, dtype=np.uint8)]
    counts = np.zeros((len(text) + 1, _OTHER + 1))
    counts[np.arange(1, len(text) + 1), classes] = 1
    totals = np.cumsum(counts, axis=0)
    columns = []
    for window in WINDOWS:
        begin = np.maximum(places - window, 0)
        length = np.maximum(places - begin, 1)[:, None]
        # A square root spreads out rare classes: one bracket in a window says more than one letter more.
        columns.append(np.sqrt((totals[places] - totals[begin]) / length))
    columns.append(counts[places])
    columns += [np.minimum(places / window, 1.0)[:, None] for window in WINDOWS]
    columns.append(np.ones((len(places), 1)))
    return np.hstack(columns)
