"""The leading-space rule of a bare `tokenizer.model`: where SentencePiece itself adds a space in front of a text.

Converted without a class that knows the model, the file becomes a tokenizer that adds none, and a prompt would begin
with other tokens than in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixlm.tokenization.vocabulary import SPACE, components


def restore_leading_space(tokenizer: Any, file: Path) -> None:
    """Give a `tokenizers.Tokenizer` the leading-space rule of the SentencePiece model that it was converted from.

    A tokenizer that already splits or marks spaces was converted by a class that knows its model, and stays as it is.
    """
    import sentencepiece.sentencepiece_model_pb2 as protobuf
    from tokenizers import normalizers, pre_tokenizers

    if r"\\A" in str(components(tokenizer, "normalizer")):
        # Since transformers 5.24, the conversion without a class adds spaces by expressions and marks.
        parts = [part for part in tokenizer.normalizer if isinstance(part, normalizers.Precompiled)]
        tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", SPACE)])
        tokenizer.pre_tokenizer = None
    if tokenizer.pre_tokenizer is not None or any(
        part["type"] == "Prepend" for part in components(tokenizer, "normalizer")
    ):
        return
    model: Any = protobuf.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(file.read_bytes())
    rules = model.normalizer_spec
    if not rules.add_dummy_prefix:
        return
    if rules.remove_extra_whitespaces:
        # A text that begins with a space gets no other.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        existing = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *existing])
