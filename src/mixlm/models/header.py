"""Read the header of a GGUF file, and check that the file is complete.

The reader of the gguf library creates an array view for every token, which takes ten seconds for a vocabulary of
262,144. This one skips token texts unless they are requested.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlm.errors import ModelLoadError
from mixlm.models.cache import remembered

_AGAIN = "download or copy the file again"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Values in a block and bytes of a block, by the type of a tensor: F32, F16, Q4_0 to Q8_0, Q2_K to Q6_K, BF16. The gguf
# library knows all types, and takes long to import.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 30: (1, 2)},
}
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


class _HeaderReader:
    """Reads consecutive little-endian values.

    Args:
        data: The file.
        texts: Whether to read arrays of strings, not only count them.
    """

    def __init__(self, data: mmap.mmap, *, texts: bool = False) -> None:
        self._data = data
        self._texts = texts
        self.offset = 0

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        # A broken count could otherwise request more memory than there is.
        if self.offset + size > len(self._data):
            raise struct.error("past the end")
        values = struct.unpack_from(f"<{count}{code}", self._data, self.offset)
        self.offset += size
        return values

    def skip_string(self) -> None:
        (length,) = self.values("Q")
        self.offset += length

    def string(self) -> str:
        start = self.offset + 8
        self.skip_string()
        if self.offset > len(self._data):
            raise struct.error("past the end")
        return self._data[start : self.offset].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a value; for an array of strings only its length, unless `texts` is set."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.values(_SCALARS[kind])[0]
        kind, count = self.values("IQ")
        if kind in _SCALARS:
            return self.values(_SCALARS[kind], count)
        if kind == _STRING and self._texts:
            return [self.string() for _ in range(count)]
        if kind == _STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self.value(kind)
        return count

    def _skip_strings(self, count: int) -> None:
        data, offset, size = self._data, self.offset, len(self._data)
        for _ in range(count):
            offset += 8 + int.from_bytes(data[offset : offset + 8], "little")
            if offset > size:
                raise struct.error("past the end")
        self.offset = offset


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and check that the file is complete.

    Raises:
        ModelLoadError: The file cannot be read, is not GGUF, is truncated, or is one part of a split file.
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
        ends=tuple(dict.fromkeys(end for end in ends if end is not None and end >= 0)),
    )


def known_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, from an index if the file has not changed since it was read.

    Raises:
        ModelLoadError: As `read_header`.
    """
    try:
        fields = remembered(path, _INDEX, lambda: asdict(read_header(path)))
        return GgufHeader(**{**fields, "control": tuple(fields["control"]), "ends": tuple(fields["ends"])})
    except (OSError, TypeError, LookupError):  # no such file, or an entry of another form
        return read_header(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all key-value pairs of a GGUF file, including token texts.

    Raises:
        ModelLoadError: As `read_header`.
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
    reader = _HeaderReader(data, texts=texts)
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
    needed = 0
    for _ in range(tensors):
        name = reader.string()
        (dimensions,) = reader.values("I")
        shape = reader.values("Q", dimensions)
        kind, offset = reader.values("IQ")
        sizes = _BLOCKS.get(kind) or _rare_block(kind)
        if sizes is None:
            raise ModelLoadError(f"{path}: the tensor {name} has the unknown quantization type {kind}", _AGAIN)
        block, block_bytes = sizes
        needed = max(needed, offset + math.prod(shape) // block * block_bytes)
    needed += -(-reader.offset // alignment) * alignment
    if needed > size:
        raise ModelLoadError(f"{path} is cut off: its tensors need {needed:,} bytes, the file has {size:,}", _AGAIN)


def _rare_block(kind: int) -> tuple[int, int] | None:
    """Return the values in a block and its bytes for any type of tensor; None for one that is not known."""
    from gguf import GGML_QUANT_SIZES

    return {int(known): sizes for known, sizes in GGML_QUANT_SIZES.items()}.get(kind)
