"""A GGUF file small enough to write in a test, and real enough for llama.cpp to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

HIDDEN, ROWS = 32, 260


def write_tiny_gguf(  # noqa: PLR0913
    path: Path,
    *,
    architecture: str = "llama",
    stop_at: int | None = None,
    context: int = 64,
    seed: int = 0,
    pre: str | None = None,
    merges: Sequence[tuple[str, str]] = (("a", "b"), ("c", "d")),
    more: Sequence[str] = (),
    model_name: str = "",
    pieces: Sequence[tuple[str, int]] = (),
    space_prefix: bool = True,
) -> Path:
    """Write a one-layer model with a byte vocabulary.

    Args:
        path: The file.
        architecture: Its name in the file.
        stop_at: Cuts the file off there.
        context: Length of its context.
        seed: Of the weights.
        pre: Name of the pre-tokenizer.
        merges: Merges of the vocabulary; what they make are tokens.
        more: Further tokens.
        model_name: Its name in the file.
        pieces: Tokens of SentencePiece and their types, the best first, in place of the byte vocabulary.
        space_prefix: Whether SentencePiece puts a space in front of a text.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    if model_name:
        writer.add_name(model_name)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    # The 256 single-character names that byte-level vocabularies give to bytes.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    names += ["<end>", "<turn>", *(left + right for left, right in merges), *more]
    names = list(dict.fromkeys(names))
    types = [3 if token in (256, 257) else 1 for token in range(len(names))]
    if pieces:
        heads = [("<unk>", 2), *((f"<0x{byte:02X}>", 6) for byte in range(255)), ("<s>", 3), ("</s>", 3)]
        names, types = map(list, zip(*heads, *pieces, strict=True))
        writer.add_token_scores([-float(rank) for rank in range(len(names))])
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(space_prefix)
    rows = len(names)
    writer.add_vocab_size(rows)
    writer.add_token_list(names)
    writer.add_token_types(types)
    if not pieces:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(257)
    random = np.random.default_rng(seed)
    shapes = {"token_embd": (rows, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{norm}_norm": (HIDDEN,) for norm in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if stop_at is not None:
        path.write_bytes(path.read_bytes()[:stop_at])
    return path
