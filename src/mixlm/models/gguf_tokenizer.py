"""The tokenizer inside a GGUF file, as llama.cpp reads it, written as a Hugging Face tokenizer folder.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) in place of describing it. `PRE_TOKENIZERS` has the pattern
behind each name, from llama.cpp's src/llama-vocab.cpp; a test compares the ids with llama.cpp's own. No model library
is needed: a tokenizer is there in seconds, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mixlm.errors import ModelLoadError, UnsupportedError
from mixlm.tokenization.vocabulary import SPACE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_MERGEABLE = (_NORMAL, _USER_DEFINED, _UNUSED)
# Models whose added tokens take the white space after them, and those of their tokens that do not.
_TAKES_SPACES = ("phi-3", "phi3")
_TAKES_NONE = ("<unk>", "<s>", "<|endoftext|>")

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_NOT_LOWER, _NOT_UPPER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}*{_NOT_UPPER}+|[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}+{_NOT_UPPER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}*{_NOT_UPPER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}+{_NOT_UPPER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp cuts a text before it merges bytes.

    Args:
        patterns: applied one after another; each cuts the parts that those before it left, at its matches.
        whole_words: a part that is a token itself is not cut further ("ignore merges").
        begin: whether a beginning-of-text token stands in front of a text unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begin: bool = False


_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
# Pre-tokenizers, and the names by which files have them.
_RULES: tuple[tuple[PreTokenizer, str], ...] = (
    (PreTokenizer(_DEFAULT), "default"),
    (
        PreTokenizer((_GPT2,)),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
    ),
    (PreTokenizer((r"\p{N}", _GPT2)), "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (
        PreTokenizer((_LLAMA3,), whole_words=True, begin=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (
        PreTokenizer((_QWEN2,)),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2",
    ),
    (PreTokenizer((_QWEN35,)), "qwen35"),
    (PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (
        PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[[一-龥ࠀ-一가-퟿]&&\S]+", r"\p{N}")),
        "deepseek-coder",
    ),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (PreTokenizer((_BLOOM,)), "poro-chat bloom gpt3-finnish"),
    (PreTokenizer((_BLOOM, r"\p{N}")), "viking"),
    (PreTokenizer((_TEKKEN,), whole_words=True, begin=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        PreTokenizer(
            (
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        PreTokenizer((rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
        "seed-coder",
    ),
    (PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), whole_words=True), "minicpm5"),
    (PreTokenizer(("[^\\n]+|[\\n]+", _QWEN2)), "laguna"),
    (PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")), "superbpe"),
    (
        PreTokenizer(
            (
                *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )"),
                *(r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
            ),
            begin=True,
        ),
        "chameleon",
    ),
    (
        PreTokenizer(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
        "exaone-moe",
    ),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: rule for rule, names in _RULES for name in names.split()}
# Not kimi-k2, afmoe, tiny_aya, cohere2moe, gemma4, sarvam-moe and youtu: llama.cpp has code of its own for these, or
# patterns that its own engine reads in another way than this library.


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write the tokenizer of a GGUF file into a folder: tokenizer.json, its configuration and its chat template.

    Args:
        metadata: the file's key-value pairs (`header.read_metadata`).
        folder: an existing folder.
        name: the file, for messages.

    Raises:
        ModelLoadError: the file lacks a part of its tokenizer.
        UnsupportedError: it has a tokenizer of another kind than byte-level BPE and SentencePiece BPE, or a
            pre-tokenizer that is not known.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens: Sequence[str] = fields.get("tokens") or ()
    if not tokens:
        raise ModelLoadError(f"{name} has no tokenizer", "use a GGUF file of a language model")
    kind = fields.get("model")
    if kind == "gpt2":
        tokenizer, begin = _byte_level(fields, tokens, name)
    elif kind == "llama":
        tokenizer, begin = _sentencepiece(fields, tokens, name)
    else:
        raise UnsupportedError(
            f"{name} has a tokenizer of the kind {kind!r}; mixlm reads 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece)",
            "a folder with the same model in safetensors may load",
        )
    _add_tokens(tokenizer, fields, tokens, str(metadata.get("general.name", "")))
    special = {
        f"{role}_token": tokens[fields[f"{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if fields.get(f"{key}_token_id") is not None and fields[f"{key}_token_id"] < len(tokens)
    }
    _put_in_front(tokenizer, special.get("bos_token") if fields.get("add_bos_token", begin) else None)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, "utf-8")


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], name: str) -> tuple[Any, bool]:
    """Return a byte-level BPE tokenizer, and whether it puts a beginning-of-text token in front by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = fields.get("pre") or "default"
    rule = PRE_TOKENIZERS.get(pre)
    if rule is None:
        raise UnsupportedError(
            f"{name} has the pre-tokenizer {pre!r}, which mixlm does not read from GGUF files",
            "a folder with the same model in safetensors may load",
        )
    cuts = ((merge, merge.index(" ", 1)) for merge in fields.get("merges") or ())  # a part may begin with a space
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.begin


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], name: str) -> tuple[Any, bool]:
    """Return a SentencePiece BPE tokenizer, and whether it puts a beginning-of-text token in front by default.

    SentencePiece merges the pair whose whole has the best score, the leftmost of equal ones; as a list of merges that
    is every way to cut a token into two others, in the order of the scores.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.get("scores")
    if scores is None or len(scores) < len(tokens):
        raise ModelLoadError(f"{name} has no scores for its {len(tokens)} tokens", "download or copy the file again")
    kinds = [*(fields.get("token_type") or ()), *[_NORMAL] * len(tokens)][: len(tokens)]
    mergeable = {token: scores[i] for i, token in enumerate(tokens) if kinds[i] in _MERGEABLE}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(mergeable, key=lambda token: -mergeable[token])
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL}
    made = dict.fromkeys(left + right for left, right in merges if left + right in normal)
    if tied := [pair for pair in pairwise(made) if mergeable[pair[0]] == mergeable[pair[1]]]:
        raise UnsupportedError(
            f"{name} has equal scores for tokens such as {tied[0][0]!r} and {tied[0][1]!r}: which one is made depends "
            "on the text around them, which mixlm cannot read",
            "a folder with the same model in safetensors may load",
        )
    unknown = fields.get("unknown_token_id", 0)
    byte_fallback = "<0x00>" in set(tokens)
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _last_merges(merges),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    prefix = bool(fields.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _last_merges(merges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the merges that ever make a token, in their order: less than half of them, which load in half the time.

    A token is always made in one way, in which it is made of its characters alone: what stands beside them counts only
    where something is merged across their ends, and then there is no such token.
    """
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    ways: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        ways.setdefault(left + right, []).append((left, right))
    last = {ways[token][0] if len(ways[token]) == 1 else _last_merge(token, ranks) for token in ways}
    return [merge for merge in merges if merge in last]


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """Return the merge that makes a token of its characters; None where they are never merged into it."""
    never = len(ranks)
    parts = list(token)
    while True:
        rank, i = min((ranks.get(pair, never), i) for i, pair in enumerate(pairwise(parts)))
        if rank == never or len(parts) == 2:
            return None if rank == never else (parts[0], parts[1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _add_tokens(tokenizer: Any, fields: Mapping[str, Any], tokens: Sequence[str], model: str) -> None:
    """Mark the file's control tokens, and those that are found in a text before anything is merged.

    model: its name in the file, by which llama.cpp knows whose tokens take the white space after them.
    """
    from tokenizers import AddedToken

    takes_spaces = any(name in model.lower() for name in _TAKES_SPACES)

    def added(token: str, *, special: bool) -> Any:
        rstrip = takes_spaces and token not in _TAKES_NONE
        return AddedToken(token, special=special, normalized=False, rstrip=rstrip)

    kinds = fields.get("token_type") or ()
    pairs = list(zip(tokens, kinds, strict=False))
    special = [added(token, special=True) for token, kind in pairs if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([added(token, special=False) for token, kind in pairs if kind == _USER_DEFINED])


def _put_in_front(tokenizer: Any, begin: str | None) -> None:
    from tokenizers import processors

    special = [] if begin is None else [(begin, tokenizer.token_to_id(begin))]
    single = "$A" if begin is None else f"{begin} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
