"""What a bare `tokenizer.model` says beside its pieces: where SentencePiece itself puts a space in front of a text.

Read without a class that knows the model, the file is turned into a tokenizer that puts none, and a prompt would begin
with other tokens than in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixlm.tokenization.vocabulary import SPACE, describe


def restore_leading_space(tokenizer: Any, file: Path) -> None:
    """Give a `tokenizers.Tokenizer` the leading-space rule of the SentencePiece model that it was made from.

    A tokenizer that splits or marks spaces by itself already was made by a class that knows better, and is left alone.
    """
    import sentencepiece.sentencepiece_model_pb2 as protobuf
    from tokenizers import normalizers, pre_tokenizers

    parts = describe(tokenizer)
    if parts["pre_tokenizer"] is not None or '"Prepend"' in str(parts["normalizer"]).replace("'", '"'):
        return
    model: Any = protobuf.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(file.read_bytes())
    rules = model.normalizer_spec
    if not rules.add_dummy_prefix:
        return
    if rules.remove_extra_whitespaces:
        # A text that begins with a space is not given another.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *own])
