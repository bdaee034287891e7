"""A fuzzer: whatever a tokenizer is made of, what a member reads is what the tokenizer gives for the whole text.

Tokenizers are trained on a few lines with random normalizers, pre-tokenizers, models, decoders and added tokens. A text
then grows by pieces of any length and is cut back; its ids are compared with those of the tokenizer itself, and prompts
with the ids of the tokenizer for the rendered conversation. Tokenizers whose tokens do not tell the text are refused.

python -m research.fuzz_tokenizers [--minutes N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mixlm.errors import TokenizerError
from mixlm.tokenization.incremental import IncrementalEncoder, TokenizerEncoder
from mixlm.tokenization.prompt_encoder import PromptEncoder
from mixlm.tokenization.vocabulary import components, detect_family, token_bytes
from mixlm.types import Message

_MEMORY = 6 << 30  # bytes of address space
CORPUS = (
    *("The river turns under the old stone bridge, and the birds fly over it.", "ab abc aab 12345678 1,234,567.89"),
    *("It's 2024; they've paid 1,250.75 for 3 books (don't ask why)!", "def f(x):\n    return x\n\n\tpass\r\n"),
    *(
        "Größe, naïve café, señor; “quoted” … ﬁn ①②½",
        "日本語のテキストと中文文本。한국어 문장도 있다.",
        "Привет, мир! Ελληνικά",
    ),
    *("👍🏽 👩‍👩‍👧 🎉🎉 ok <tool> </tool> [INST]", "  two  spaces   three\t\ttabs "),
)
PIECES = (
    *(
        "the",
        " the",
        " river",
        "it's",
        "'ve",
        "'",
        "'S",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\r",
        "1",
        "250",
        "12345678",
    ),
    *(
        ".",
        ",",
        "...",
        "é",
        "e\u0301",
        "\u0301",
        "\u0327",
        "日本",
        "語",
        "한국",
        "\u1112\u1161\u11ab",
        "\u1112",
        "\u1161",
        "👍🏽",
    ),
    *(
        "👩\u200d👧",
        "🎉",
        "Ж",
        "ß",
        "ſ",
        "ﬁ",
        "ﬆ",
        "İ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x00",
        "\x1c",
        "\x85",
        "x",
        "ab",
        "aab",
        "b",
    ),
    *(
        "<tool>",
        "</tool>",
        "<to",
        "ol>",
        "tool",
        "now",
        "nowhere",
        " now ",
        "▁",
        "▁▁",
        "½",
        "²",
        "①",
        "\u0600",
        "\u0e33",
        "\u0903",
    ),
    *(
        "_",
        "-",
        "--",
        "–",
        "$",
        "+",
        "A",
        "Abc",
        "ABC",
        "ǅ",
        "🇨🇭",
        "🇨",
        "\ufe0f",
        "\u200b",
        "\ufeff",
        "\U000e0067",
        "\u0958",
        "\u212b",
    ),
)
SPECIAL = ("<s>", "</s>", "<|turn|>")
PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    *(
        r"\d{1,3}(?=(\d{3})*(?!\d))",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
        r"\s+(?!\S)",
        r"\s+",
        r"\p{N}",
        r"\p{N}{1,3}",
        r"\w+|[^\w\s]+",
    ),
    *(
        "a+b|a",
        "(ab)+|a|b",
        r"\p{L}+(?=.*\d)",
        r"x(?=\w*y)|\w",
        r"(?<=a)b",
        r"\bthe\b",
        "(?i)THE|st",
        "[一-鿿]+|[^一-鿿]+",
        r"^\s+|\w+$",
    ),
    *(
        r"\X",
        r"(a)\1",
        "[^\n]+|\n+",
        r"\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})",
        ".{1,4}",
        r"(?:\s\S+)+?(?=\s)",
        r"[\p{P}\p{S}]++|\s{2,}",
        "",
    ),
)
BEHAVIORS = ("isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Case:
    """A tokenizer as JSON, and what it is made of."""

    tokenizer: str
    parts: str


def _normalizer(rng: Random) -> Any:
    replaced: Any = rng.choice(
        [" ", "ab", "a", "--", Regex(r"\s+"), Regex(r"\p{N}+(?!\p{N})"), Regex("a+b|a"), Regex(" {2,}")]
    )
    return rng.choice(
        [
            *(normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(), normalizers.Nmt()),
            *(
                normalizers.Lowercase(),
                normalizers.StripAccents(),
                normalizers.Strip(rng.random() < 0.5, rng.random() < 0.5),
            ),
            normalizers.Replace(replaced, rng.choice(["", "x", " ", "▁", "ba"])),
            normalizers.BertNormalizer(*(rng.random() < 0.5 for _ in range(4))),
            normalizers.Prepend(rng.choice(["▁", " ", "x"])),
        ]
    )


def _splitter(rng: Random) -> Any:
    behavior = rng.choice(BEHAVIORS)
    pattern = Regex(rng.choice(PATTERNS)) if rng.random() < 0.8 else rng.choice([" ", "ab", "--", "\n"])
    split = pre_tokenizers.Split(pattern, behavior, invert=rng.random() < 0.2)
    other = rng.choice(
        [
            *(pre_tokenizers.Digits(individual_digits=rng.random() < 0.5), pre_tokenizers.Punctuation(behavior)),
            *(pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.BertPreTokenizer()),
            *(pre_tokenizers.CharDelimiterSplit(rng.choice("ab-")), pre_tokenizers.UnicodeScripts()),
            pre_tokenizers.FixedLength(rng.randint(1, 4)),
            pre_tokenizers.Metaspace(prepend_scheme=rng.choice(["always", "never", "first"]), split=rng.random() < 0.7),
            pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.3, use_regex=rng.random() < 0.5),
        ]
    )
    return split if rng.random() < 0.6 else other


def _trained(rng: Random, *, byte_level: bool) -> Tokenizer:
    """Train a tokenizer of one family with random parts."""
    kind = rng.choice(
        ["BPE", "BPE", "Unigram", "WordLevel", "WordPiece"] if byte_level else ["BPE", "Unigram", "WordLevel"]
    )
    steps = [_normalizer(rng) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
    splits = [_splitter(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    if byte_level:
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.1, use_regex=rng.random() < 0.3))
    elif rng.random() < 0.5:
        steps.append(normalizers.Replace(" ", "▁"))
    else:
        splits.append(
            pre_tokenizers.Metaspace(prepend_scheme=rng.choice(["always", "never", "first"]), split=rng.random() < 0.7)
        )
    base = Tokenizer(getattr(models, kind)())
    unknown = {"unk_token": "<unk>"} if kind == "Unigram" else {}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    options = {"show_progress": False, "special_tokens": ["<unk>"], "vocab_size": 420 if byte_level else 300, **unknown}
    if kind != "WordLevel":
        options["initial_alphabet"] = alphabet
    if splits:
        base.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 or rng.random() < 0.3 else splits[0]
    if steps:
        base.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    base.train_from_iterator(CORPUS, getattr(trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")(**options))
    if byte_level:
        base.decoder = decoders.ByteLevel()
    else:
        base = _with_bytes(rng, base) if kind != "WordLevel" and rng.random() < 0.5 else base
        spaces = decoders.Replace("▁", " ")
        base.decoder = rng.choice(
            [
                decoders.Metaspace(prepend_scheme=rng.choice(["always", "never", "first"])),
                decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()]),
                decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
            ]
        )
    return base


def _with_bytes(rng: Random, tokenizer: Tokenizer) -> Tokenizer:
    """Give a model tokens for bytes."""
    state = json.loads(tokenizer.to_str())
    model, names = state["model"], [f"<0x{b:02X}>" for b in range(256)]
    if model["type"] == "Unigram":
        model["vocab"] += [[name, -20.0] for name in names]
        model["byte_fallback"] = True
    else:
        missing = [name for name in names if name not in model["vocab"]]
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(missing)}
        model |= {"byte_fallback": True, "fuse_unk": rng.random() < 0.7, "unk_token": "<unk>"}
    return Tokenizer.from_str(json.dumps(state))


def random_case(rng: Random) -> Case:
    """Train a tokenizer with random parts and added tokens."""
    tokenizer = _trained(rng, byte_level=rng.random() < 0.6)
    state = json.loads(tokenizer.to_str())
    if state["model"]["type"] == "BPE":
        state["model"]["ignore_merges"] = rng.random() < 0.3
        state["model"]["dropout"] = 0.1 if rng.random() < 0.02 else None
    tokenizer = Tokenizer.from_str(json.dumps(state))

    def added(content: str, *, special: bool) -> AddedToken:
        flags = {flag: rng.random() < 0.25 for flag in FLAGS}
        return AddedToken(content, special=special, **flags)

    tokenizer.add_special_tokens([added(content, special=True) for content in SPECIAL])
    if rng.random() < 0.4:
        tokenizer.add_tokens([added(content, special=False) for content in ("<tool>", "</tool>", "now", "\n\n", " x")])
    text = tokenizer.to_str()
    state = json.loads(text)
    model = {key: value for key, value in state["model"].items() if key not in ("vocab", "merges")}
    parts = [state["normalizer"], state["pre_tokenizer"], model, state["decoder"]]
    flags = [[token["content"], [flag for flag in FLAGS if token[flag]]] for token in state["added_tokens"]]
    return Case(text, json.dumps([*parts, flags], ensure_ascii=False))


def random_text(rng: Random) -> str:
    """Return a text of parts that are hard for tokenizers."""
    letters = [lambda: rng.choice(PIECES), lambda: rng.choice(" ab1,\n"), lambda: chr(rng.randint(0x20, 0xD7FF))]
    return "".join(rng.choices(letters, [12, 6, 1])[0]() for _ in range(rng.randint(1, 30)))


def check(case: Case, rng: Random, texts: int) -> str | None:
    """Compare what a member reads with what the tokenizer gives.

    Returns:
        None where all is equal, or why the tokenizer is refused.

    Raises:
        AssertionError: they differ.
    """
    try:
        tokenizer = Tokenizer.from_str(case.tokenizer)
        family = detect_family(tokenizer, "it")
        token_bytes(tokenizer, family, "it")
    except TokenizerError as error:
        return error.message
    encoder = TokenizerEncoder(tokenizer, family)
    reference = _reference(case)
    own = Tokenizer.from_str(case.tokenizer)
    for _ in range(texts):
        text = random_text(rng)
        try:
            _check_growth(encoder, reference, text, rng)
            _check_prompts(own, encoder, text, rng)
        except TokenizerError:  # the library itself panics
            continue
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
    return None


def _reference(case: Case) -> Callable[[str], list[int]]:
    """Return the tokenizer's own encoding of a text that continues a prompt: without the leading space."""
    state, own = json.loads(case.tokenizer), Tokenizer.from_str(case.tokenizer)
    steps = [part for part in components(own, "normalizer") if part["type"] != "Prepend"]
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    splits = [{key: never.get(key, value) for key, value in part.items()} for part in components(own, "pre_tokenizer")]
    state["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits} if splits else None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _check_growth(encoder: TokenizerEncoder, reference: Callable[[str], list[int]], text: str, rng: Random) -> None:
    data = text.encode()
    incremental, length = IncrementalEncoder(encoder), 0
    ids: list[int] = []
    history: list[int] = []
    for _ in range(60):
        if length == len(data) and rng.random() < 0.5:
            break
        if length and rng.random() < 0.2:
            length = rng.randrange(length)
            incremental.truncate(length)
        else:
            length = min(length + rng.choice([1, 1, 2, 3, 8, 20]), len(data))
        history.append(length)
        dropped, more = incremental.update(data[:length])
        ids = ids[: len(ids) - dropped] + more
        assert ids == encoder.encode(data[:length]).ids, (text, history)
        try:
            prefix = data[:length].decode()
        except UnicodeDecodeError:
            continue
        assert ids == reference(prefix), (prefix, history)


def _check_prompts(own: Tokenizer, encoder: TokenizerEncoder, text: str, rng: Random) -> None:
    special = {token.content: i for i, token in own.get_added_tokens_decoder().items() if token.special}
    space = rng.choice(["", " ", "\n", "x"])

    def render(messages: Any) -> str:
        return f"{space}<s>{space}{messages[0].content}{space}</s>{space}<|turn|>{space}it:"

    prompts = PromptEncoder(encoder, special, render)
    message = Message("user", text)
    expected = own.encode(render([message]), add_special_tokens=False).ids
    # Models that read words as a whole take special tokens from a text that spells them; a member does not.
    whole_words = (type(own.model).__name__ != "BPE" or own.model.ignore_merges) and any(
        spelling in f"{text}{own.normalizer.normalize_str(text) if own.normalizer else ''}"
        or own.get_added_tokens_decoder()[i].single_word
        or own.get_added_tokens_decoder()[i].normalized
        for spelling, i in special.items()
    )
    if not whole_words and not encoder.spells_special(text):
        assert prompts.chat([message]).tolist() == expected, render([message])
        own.encode_special_tokens = True
        assert prompts.raw(text).tolist() == own.encode(text, add_special_tokens=False).ids, text
        own.encode_special_tokens = False


def try_seeds(first: int, deadline: float) -> None:
    """Try one seed after another until a time of `time.time`, and print a line before and after each: seed, outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    seed = first
    while time.time() < deadline:
        rng = Random(seed)
        print(f"{seed} training", flush=True)
        try:
            case = random_case(rng)
        except BaseException as error:  # the library cannot train these parts, or panics
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"{seed} not trained", flush=True)
        else:
            print(f"{seed} compared", flush=True)
            print(f"{seed} {_outcome(case, rng)}", flush=True)
        seed += 1


def _outcome(case: Case, rng: Random) -> str:
    try:
        return "equal" if check(case, rng, texts=20) is None else "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        message = f"{type(error).__name__} {str(error)[:600]} in {case.parts[:1500]}"
        return "FAILED " + " ".join(message.split())


def main() -> None:
    """Run the fuzzer. A tokenizer that ends its process, as a library may do, is named, and the next one is tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    outcomes: Counter[str] = Counter()
    seed, last = options.seed, ""
    while time.time() < deadline:
        code = f"from research.fuzz_tokenizers import try_seeds; try_seeds({seed}, {deadline})"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                number, last = line.rstrip().split(" ", 1)
                seed = int(number) + 1
                if last not in ("training", "compared"):
                    outcomes[last.split()[0] if last.startswith("FAILED") else last] += 1
                if last.startswith("FAILED"):
                    print(f"seed {number}: {last}", flush=True)
        if process.returncode:
            outcomes[f"ended while {last}"] += 1
            print(f"seed {seed - 1}: its process ended with {process.returncode} while it was {last}", flush=True)
    print(dict(outcomes))


if __name__ == "__main__":
    main()
