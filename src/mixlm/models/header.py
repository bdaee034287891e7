"""The header of a GGUF file: what mixlm keeps of it, and whether the file is whole.

The general reader makes an array view of every token, which takes ten seconds for a vocabulary of 262 144. Here the
token texts are only stepped over unless they are wanted, so a broken file is refused at once and a good one costs
little.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlm.errors import ModelLoadError

_AGAIN = "download or copy the file again"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL = 3  # in tokenizer.ggml.token_type: tokens that steer, such as <|im_end|>, and are never text


@dataclass(frozen=True)
class GgufHeader:
    """What mixlm keeps of a GGUF file's header."""

    architecture: str
    context: int | None  # tokens the model was made for
    tokens: int  # size of the vocabulary
    control: tuple[int, ...]  # ids of control tokens
    ends: tuple[int, ...]  # ids of the tokens that end a text, a turn or a message


class _HeaderReader:
    """Reads little-endian values one after another. texts: whether arrays of strings are read, or only counted."""

    def __init__(self, data: mmap.mmap, *, texts: bool = False) -> None:
        self._data = data
        self._texts = texts
        self.at = 0

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        # Checked here because a broken count can ask for more memory than there is.
        if self.at + size > len(self._data):
            raise struct.error("past the end")
        found = struct.unpack_from(f"<{count}{code}", self._data, self.at)
        self.at += size
        return found

    def skip_string(self) -> None:
        (length,) = self.values("Q")
        self.at += length

    def string(self) -> str:
        start = self.at + 8
        self.skip_string()
        if self.at > len(self._data):
            raise struct.error("past the end")
        return self._data[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a value; of an array of strings only how many there are, unless `texts` are wanted."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.values(_SCALARS[kind])[0]
        kind, count = self.values("IQ")
        if kind in _SCALARS:
            return self.values(_SCALARS[kind], count)
        if kind == _STRING and self._texts:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            if kind == _STRING:
                self.skip_string()
            else:
                self.value(kind)
        return count


def read_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at `path` and check that the file is whole.

    Raises:
        ModelLoadError: the file cannot be read, is not GGUF, is cut off, or is one part of a split file.
    """
    meta = _read(path, texts=False)
    architecture = str(meta.get("general.architecture", "unknown"))
    tokenizer = "tokenizer.ggml."
    kinds = meta.get(tokenizer + "token_type", ())
    ends = (meta.get(f"{tokenizer}{end}_token_id") for end in ("eos", "eot", "eom"))
    return GgufHeader(
        architecture=architecture,
        context=meta.get(f"{architecture}.context_length"),
        tokens=meta.get(tokenizer + "tokens", 0),
        control=tuple(number for number, kind in enumerate(kinds) if kind == _CONTROL),
        ends=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all key-value pairs of the GGUF file at `path`, token texts included.

    Raises:
        ModelLoadError: as `read_header`.
    """
    return _read(path, texts=True)


def _read(path: Path, *, texts: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelLoadError(
                    f"{path} is not a GGUF file: it starts with {magic!r}, not {b'GGUF'!r}"
                    if magic
                    else f"{path} is empty, not a GGUF file",
                    _AGAIN,
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, texts=texts)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
    except struct.error as error:
        raise ModelLoadError(f"{path} is cut off: it ends inside its own header", _AGAIN) from error
    except KeyError as error:
        raise ModelLoadError(f"{path} is broken: no GGUF value has type {error.args[0]}", _AGAIN) from error


def _parse(path: Path, data: mmap.mmap, *, texts: bool) -> dict[str, Any]:
    cursor = _HeaderReader(data, texts=texts)
    cursor.at = 4
    (version,) = cursor.values("I")
    if version not in _VERSIONS:
        raise ModelLoadError(f"{path} is GGUF version {version}; allowed: 2 or 3, little-endian", _AGAIN)
    tensors, fields = cursor.values("Q", 2)
    meta: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.string()
        meta[key] = cursor.value(cursor.values("I")[0])
    if meta.get("split.count", 1) > 1:
        raise ModelLoadError(
            f"{path} is part {meta.get('split.no', 0) + 1} of {meta['split.count']} of a split GGUF file",
            "merge the parts into one file first (llama-gguf-split --merge)",
        )
    _check_whole(path, cursor, tensors, meta.get("general.alignment", 32), len(data))
    return meta


def _check_whole(path: Path, cursor: _HeaderReader, tensors: int, alignment: int, size: int) -> None:
    """Check that the bytes of every tensor listed lie inside the file."""
    from gguf import GGML_QUANT_SIZES

    needed = 0
    for _ in range(tensors):
        name = cursor.string()
        (dimensions,) = cursor.values("I")
        shape = cursor.values("Q", dimensions)
        kind, offset = cursor.values("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise ModelLoadError(f"{path}: the tensor {name} has the unknown quantization type {kind}", _AGAIN)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        needed = max(needed, offset + math.prod(shape) // block * block_bytes)
    needed += -(-cursor.at // alignment) * alignment
    if needed > size:
        raise ModelLoadError(f"{path} is cut off: its tensors need {needed:,} bytes, the file has {size:,}", _AGAIN)
