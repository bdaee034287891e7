"""Read the header of a GGUF file, and check that the file is complete.

The reader of the gguf library creates an array view for every token, which takes ten seconds for a vocabulary of
262,144.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlm.errors import ModelLoadError
from mixlm.models.cache import remembered

_AGAIN = "download or copy the file again"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_INDEX = "gguf-headers-1.json"  # its number increases when what is read of a header changes
_CONTROL = 3  # the type of control tokens such as <|im_end|> in tokenizer.ggml.token_type


@dataclass(frozen=True)
class GgufHeader:
    """The part of a GGUF header that mixlm uses."""

    architecture: str
    context: int | None  # context length
    tokens: int  # size of the vocabulary
    control: tuple[int, ...]  # ids of control tokens
    ends: tuple[int, ...]  # ids of the tokens that end a text, a turn or a message

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> GgufHeader:
        """Return what mixlm uses of a file's key-value pairs."""
        architecture = str(metadata.get("general.architecture", "unknown"))
        tokenizer = "tokenizer.ggml."
        kinds = metadata.get(tokenizer + "token_type", ())
        ends = (metadata.get(f"{tokenizer}{end}_token_id") for end in ("eos", "eot", "eom"))
        return cls(
            architecture=architecture,
            context=metadata.get(f"{architecture}.context_length"),
            tokens=len(metadata.get(tokenizer + "tokens", ())),
            control=tuple(number for number, kind in enumerate(kinds) if kind == _CONTROL),
            ends=tuple(dict.fromkeys(end for end in ends if end is not None and end >= 0)),
        )


class _HeaderReader:
    """Reads consecutive little-endian values of a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        # A broken count could otherwise request more memory than there is.
        if self.offset + size > len(self._data):
            raise struct.error("past the end")
        values = struct.unpack_from(f"<{count}{code}", self._data, self.offset)
        self.offset += size
        return values

    def string(self) -> str:
        start = self.offset + 8
        self.offset = start + int.from_bytes(self._data[self.offset : start], "little")
        if self.offset > len(self._data):
            raise struct.error("past the end")
        return self._data[start : self.offset].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.values(_SCALARS[kind])[0]
        kind, count = self.values("IQ")
        if kind in _SCALARS:
            return self.values(_SCALARS[kind], count)
        return [self.value(kind) for _ in range(count)]


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, from an index if the file has not changed since it was read.

    Raises:
        ModelLoadError: As `read_metadata`.
    """

    def read() -> dict[str, Any]:
        return asdict(GgufHeader.of(read_metadata(path)))

    try:
        fields = remembered(path, _INDEX, read)
        return GgufHeader(**{**fields, "control": tuple(fields["control"]), "ends": tuple(fields["ends"])})
    except (OSError, TypeError, LookupError):  # no such file, or an entry of another form
        return GgufHeader(**read())


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all key-value pairs of a GGUF file, and check that the file is complete.

    Raises:
        ModelLoadError: The file cannot be read, is not GGUF, is truncated, or is one part of a split file; or the
            package gguf is missing.
    """
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
                return _parse(path, data)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
    except struct.error as error:
        raise ModelLoadError(f"{path} is cut off: it ends inside its own header", _AGAIN) from error
    except KeyError as error:
        raise ModelLoadError(f"{path} is broken: no GGUF value has type {error.args[0]}", _AGAIN) from error


def _parse(path: Path, data: mmap.mmap) -> dict[str, Any]:
    reader = _HeaderReader(data)
    reader.offset = 4
    (version,) = reader.values("I")
    if version not in _VERSIONS:
        raise ModelLoadError(f"{path} is GGUF version {version}; allowed: 2 or 3, little-endian", _AGAIN)
    tensors, fields = reader.values("Q", 2)
    meta: dict[str, Any] = {}
    for _ in range(fields):
        key = reader.string()
        meta[key] = reader.value(reader.values("I")[0])
    if meta.get("split.count", 1) > 1:
        raise ModelLoadError(
            f"{path} is part {meta.get('split.no', 0) + 1} of {meta['split.count']} of a split GGUF file",
            "merge the parts into one file first (llama-gguf-split --merge)",
        )
    _check_complete(path, reader, tensors, meta.get("general.alignment", 32), len(data))
    return meta


def _check_complete(path: Path, reader: _HeaderReader, tensors: int, alignment: int, size: int) -> None:
    """Check that the file contains all bytes of every tensor."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ModelLoadError(f"reading {path} needs gguf", "install: pip install 'mixlm[llamacpp]'") from error

    needed = 0
    for _ in range(tensors):
        name = reader.string()
        (dimensions,) = reader.values("I")
        shape = reader.values("Q", dimensions)
        kind, offset = reader.values("IQ")
        sizes = GGML_QUANT_SIZES.get(kind)
        if sizes is None:
            raise ModelLoadError(f"{path}: the tensor {name} has the unknown quantization type {kind}", _AGAIN)
        block, block_bytes = sizes
        needed = max(needed, offset + math.prod(shape) // block * block_bytes)
    needed += -(-reader.offset // alignment) * alignment
    if needed > size:
        raise ModelLoadError(f"{path} is cut off: its tensors need {needed:,} bytes, the file has {size:,}", _AGAIN)
