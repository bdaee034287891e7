"""The large tables of a `tokenizer.json`, kept beside it in a form that takes half the time to read.

JSON has half a million quoted strings in nested lists for a vocabulary of 262,144, and Python looks each key up twice.
Here they are two texts to be split: the tokens in the order of their ids, and the parts of the merges.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixlm.models.cache import cache_root, write_bytes

_FILE = "tokenizer-1.tables"  # its number increases when the form changes
_FEWEST = 10_000  # merges; fewer are read at once


def parse_tokenizer(content: bytes, folder: Path) -> Any:
    """Return the content of a `tokenizer.json`; merges are tuples or lists.

    In a folder of the cache, its tables are kept for the next time. They hold for these very bytes.

    Args:
        content: The file.
        folder: Where it stands.

    Raises:
        ValueError: It is not JSON.
    """
    if not {cache_root() / "models", cache_root() / "tokenizers"} & set(folder.absolute().parents):
        return json.loads(content)
    file = folder / _FILE
    with suppress(OSError):
        digest, _, kept = file.read_bytes().partition(b"\n")
        if digest == _digest(content, kept):
            return _unpack(kept)
    data = json.loads(content)
    if os.access(folder, os.W_OK) and (packed := _pack(data)) is not None:
        with suppress(OSError):  # it is only a cache
            write_bytes(file, _digest(content, packed) + b"\n" + packed)
    return data


def _digest(content: bytes, packed: bytes) -> bytes:
    digest = hashlib.sha256(content)
    digest.update(packed)
    return digest.hexdigest().encode()


def _pack(data: Any) -> bytes | None:
    """Return the packed form of a tokenizer with large tables; None for others, and where it does not hold them."""
    try:
        vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
        if len(merges) < _FEWEST or sorted(vocabulary.values()) != list(range(len(vocabulary))):
            return None
        parts = [part for left, right in merges for part in (left, right)]
        tokens, pairs = "\0".join(sorted(vocabulary, key=vocabulary.__getitem__)), "\0".join(parts)
        if tokens.count("\0") != len(vocabulary) - 1 or pairs.count("\0") != len(parts) - 1:
            return None
        packed = tokens.encode(), pairs.encode()
    except (TypeError, LookupError, ValueError, AttributeError):  # another kind of tokenizer, or an older form
        return None
    rest = {**data, "model": {**data["model"], "vocab": {}, "merges": []}}
    return json.dumps([len(packed[0]), rest]).encode() + b"\n" + b"".join(packed)


def _unpack(packed: bytes) -> Any:
    head, _, tables = packed.partition(b"\n")
    size, data = json.loads(head)
    tokens = tables[:size].decode().split("\0")
    parts = iter(tables[size:].decode().split("\0"))
    data["model"]["vocab"] = dict(zip(tokens, range(len(tokens)), strict=True))
    data["model"]["merges"] = list(zip(parts, parts, strict=True))
    return data
