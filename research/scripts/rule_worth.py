"""What combination rules are worth: bits per byte of texts, and right answers, at parameters that were fitted.

    python -m research.scripts.rule_worth texts prose=PATH reference=PATH code=PATH -m LARGE -m SMALL [--out DIR]
        [--train N] [--check N] [--engine hf]
    python -m research.scripts.rule_worth answers arc_easy=FILE.jsonl … --fit FILE.jsonl -m LARGE -m SMALL [--out DIR]
        [--questions N] [--fit-questions N]

The members share one vocabulary. Every variant of every rule is scored in one pass of them: `VARIANTS`. `contrastive`
has LARGE for its expert and SMALL for its amateur; its alpha is 0, since a text with one implausible token would have
no probability. `guidance` is SMALL alone, with the prompt and without it. The prompt of a passage is its first 250
bytes, which are not scored; that of an answer its question.
A rule's parameters are those under which the training part is the most likely, or the right answers of `--fit` are.
Texts are divided as in `router_study`, and the likeliest answer, by the byte, is a model's. Intervals are 95 %,
bootstrap over passages or questions, paired with the best member.

A line is written to DIR as soon as a passage or an answer is scored: a run that was stopped goes on. `--page` puts
the tables into docs/combinations.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mixlm
from mixlm.core.combinations.average import Average
from mixlm.core.combinations.base import Combination
from mixlm.core.combinations.contrastive import Contrastive
from mixlm.core.combinations.log_linear import Geometric, Guidance
from mixlm.core.combinations.power import Max, Min, Power
from mixlm.ensemble import Ensemble
from mixlm.resumable_log import ResumableLog
from mixlm.scoring.passages import Passage, text_prefix
from mixlm.scoring.rule_scores import RuleScorer
from mixlm.types import Floats
from research.benchmark.page import fill_page, table
from research.scripts.router_page import shown_accuracy
from research.scripts.router_scores import split_text, without_shared
from research.scripts.router_study import Question, interval, parse_study, read_questions, study_parser

Variant = tuple[Combination, Floats]  # a rule, and the weights of LARGE, SMALL, and SMALL without the prompt
PROMPT_BYTES = 250
_BARE = "Answer:"  # what stands in front of an answer without its question
_ROUNDS = 2000


@dataclass(frozen=True)
class _OfRows(Combination):
    """A product of some of the members. rows: which, in the order of its roles."""

    rule: Combination
    rows: tuple[int, ...]
    name = "of some members"
    is_product = True

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        return self.rule.combine(probs[list(self.rows)], weights[list(self.rows)])

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        return self.rule.log_scores([rows[row] for row in self.rows], weights[list(self.rows)])


def _of_rows(rule: Combination, rows: tuple[int, ...]) -> Variant:
    return _OfRows(rule, rows), np.full(3, 1 / 3)


def _weighted(rule: Combination, large: float) -> Variant:
    return rule, np.array([large, 1 - large, 0.0])


# By rule, and by what is fitted.
VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "large": {"": _weighted(Average(), 1.0)},
    "small": {"": _weighted(Average(), 0.0)},
    "average": {f"weight {w:g}": _weighted(Average(), w) for w in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)},
    "geometric": {
        f"weight {w:g}, strength {s:g}": _weighted(Geometric(s), w)
        for w, s in ((0.3, 1), (0.5, 1), (0.7, 1), (0.85, 1), (0.7, 1.15), (0.85, 1.1))
    },
    "power": {
        f"r {r:g}, weight {w:g}": _weighted(Power(r), w)
        for r, w in ((-1, 0.6), (0.3, 0.6), (0.3, 0.8), (0.6, 0.6), (0.6, 0.8), (2, 0.6), (2, 0.8))
    },
    "max": {"": _weighted(Max(), 0.5)},
    "min": {"": _weighted(Min(), 0.5)},
    "contrastive": {f"strength {b:g}": _of_rows(Contrastive(b, alpha=0.0), (0, 1)) for b in (0.1, 0.25, 0.5)},
    "guidance": {f"strength {g:g}": _of_rows(Guidance(g), (1, 2)) for g in (1.1, 1.25, 1.5)},
}
_NAMES = [(rule, name) for rule, variants in VARIANTS.items() for name in variants]


@dataclass(frozen=True)
class Item:
    """A passage or an answer to score. part: the text or the task. fitted: whether parameters are fitted to it."""

    part: str
    number: int
    fitted: bool
    prompt: bytes
    data: bytes
    bare: bytes = b""

    @property
    def index(self) -> str:
        """Where it stands in the log."""
        return f"{self.part}, {'fit' if self.fitted else 'check'}, {self.number}"


def text_items(inputs: Sequence[str], train: int, check: int) -> list[Item]:
    """Return the passages of texts, each after its first bytes."""
    parts = {name: split_text(Path(path), train, check) for name, _, path in (given.partition("=") for given in inputs)}
    seen = [data for fitted, _ in parts.values() for data in fitted]
    items = []
    for name, (fitted, held) in parts.items():
        for is_fitted, passages in ((True, fitted), (False, without_shared(seen, held)[0])):
            for number, data in enumerate(passages):
                cut = data.rfind(b"\n", 0, PROMPT_BYTES) + 1 or data.rfind(b" ", 0, PROMPT_BYTES)
                if cut > 0 and len(data) > PROMPT_BYTES:
                    items.append(Item(name, number, is_fitted, data[:cut], data[cut:]))
            if not any((item.part, item.fitted) == (name, is_fitted) for item in items):
                size, option = (train, "--train") if is_fitted else (check, "--check")
                raise SystemExit(
                    f"no passage of {name} is longer than its prompt of {PROMPT_BYTES} bytes at {option} {size}; "
                    "of a folder, a file gives an eighth of that at most"
                )
    return items


def answer_items(tasks: Mapping[str, Sequence[Question]], fitted: str) -> list[Item]:
    """Return the answers of questions; of those to fit, the right ones."""
    items = []
    for task, questions in tasks.items():
        answers = [
            (prompt, choice)
            for prompt, choices, right in questions
            for place, choice in enumerate(choices)
            if task != fitted or place == right
        ]
        for number, (prompt, choice) in enumerate(answers):
            items.append(Item(task, number, task == fitted, prompt.encode(), choice.encode(), _BARE.encode()))
    return items


def score_items(ensemble: Ensemble, items: Sequence[Item], log: ResumableLog, about: Any) -> dict[str, Floats]:
    """Return the natural log-probability of each item under each variant, float64 (variants,)."""
    scorer = RuleScorer(ensemble, [VARIANTS[rule][name] for rule, name in _NAMES])
    out = {}
    for done, item in enumerate(items, start=1):

        def score(item: Item = item) -> dict[str, Any]:
            engines = [member.engine for member in ensemble.members]
            prefixes = [
                np.array([*text_prefix(engine), *engine.encoder.encode(before).ids], dtype=np.int64)
                for engine, before in zip(engines, (item.prompt, item.prompt, item.bare), strict=True)
            ]
            return {"logprobs": scorer.score(Passage(item.data, prefixes))[0].tolist()}

        key = [about, hashlib.sha256(repr(item).encode()).hexdigest()]
        out[item.index] = np.array(log.get_or_make(item.index, key, score)["logprobs"])
        print(f"\r{done} of {len(items)} scored", end="", flush=True)
    print()
    return out


def fitted_variants(items: Sequence[Item], scored: Mapping[str, Floats]) -> dict[str, int]:
    """Return the number of each rule's variant under which what is fitted is the most likely."""
    total = np.sum([scored[item.index] for item in items if item.fitted], axis=0)
    return {
        rule: max((i for i, (other, _) in enumerate(_NAMES) if other == rule), key=lambda i: total[i])
        for rule in VARIANTS
    }


def text_rows(items: Sequence[Item], scored: Mapping[str, Floats]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table of bits per byte."""
    held = [item for item in items if not item.fitted]
    parts = list(dict.fromkeys(item.part for item in held))
    part_of = np.array([parts.index(item.part) for item in held])
    sizes = np.array([len(item.data) for item in held], dtype=np.float64)
    bits = -np.array([scored[item.index] for item in held]) / np.log(2)
    chosen = fitted_variants(items, scored)
    best = min((chosen["large"], chosen["small"]), key=lambda i: bits[:, i].sum())
    rows = []
    for rule, i in chosen.items():
        low, high = interval(bits[:, i] - bits[:, best], sizes, _ROUNDS)
        each = [bits[part_of == part, i].sum() / sizes[part_of == part].sum() for part in range(len(parts))]
        values = [f"{value:.4f}" for value in (*each, bits[:, i].sum() / sizes.sum())]
        rows.append([rule, _NAMES[i][1], *values, f"{low:+.4f} to {high:+.4f}" if i != best else ""])
    return ["rule", "fitted", *parts, "all, bits per byte", "minus the best member, 95 %"], rows


def answer_rows(
    items: Sequence[Item], scored: Mapping[str, Floats], tasks: Mapping[str, Sequence[Question]], fitted: str
) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table of right answers."""
    chosen = fitted_variants(items, scored)
    heads, columns = ["rule", "fitted"], []
    for task, questions in tasks.items():
        if task == fitted:
            continue
        own = [item for item in items if item.part == task]
        values = np.array([scored[item.index] / len(item.data) for item in own])
        right, first = [], 0
        for _, choices, answer in questions:
            right.append(values[first : first + len(choices)].argmax(axis=0) == answer)
            first += len(choices)
        correct = np.array(right, dtype=np.float64)  # (questions, variants)
        best = max((chosen["large"], chosen["small"]), key=lambda i: correct[:, i].sum())
        heads.append(f"{task} ({len(questions)})")
        columns.append([shown_accuracy(correct[:, i], correct[:, best]) for i in chosen.values()])
    rows = [
        [rule, _NAMES[i][1], *(column[place] for column in columns)] for place, (rule, i) in enumerate(chosen.items())
    ]
    return heads, rows


def load_members(models: Sequence[str], engine: str | None) -> Ensemble:
    """Return LARGE, SMALL, and SMALL once more, for what it says without the prompt."""
    large, small = models
    return mixlm.load(large, small, small, engine=engine, unit="token")


def main(given: Sequence[str] | None = None) -> None:
    """Score, and print the table."""
    parser = study_parser(__doc__)
    parser.set_defaults(out=Path("rule-worth"), train=12_000, check=24_000, questions=200, fit_questions=100)
    parser.add_argument("--page", type=Path, help="put the table into this page, between the marks of worth-WHAT")
    arguments = parse_study(parser, given)
    if len(arguments.model) != 2:
        parser.error(f"-m is given {len(arguments.model)} times; name two models, the large one first")
    tasks: dict[str, Sequence[Question]] = {}
    if arguments.what == "texts":
        items = text_items(arguments.inputs, arguments.train, arguments.check)
    else:
        for name, _, path in (text.partition("=") for text in arguments.inputs):
            tasks[name] = read_questions(Path(path), arguments.questions)
        tasks["fit"] = read_questions(arguments.fit, arguments.fit_questions)
        items = answer_items(tasks, "fit")
    ensemble = load_members(arguments.model, arguments.engine)
    about = [list(ensemble.names), [f"{rule} {name}".strip() for rule, name in _NAMES]]
    log = ResumableLog(arguments.out / f"{arguments.what}.jsonl", key="about", result="logprobs")
    scored = score_items(ensemble, items, log, about)
    if arguments.what == "texts":
        heads, rows = text_rows(items, scored)
    else:
        heads, rows = answer_rows(items, scored, tasks, "fit")
    names = dict(zip(("large", "small"), ensemble.names, strict=False))
    made = table(heads, [[names.get(row[0], row[0]), *row[1:]] for row in rows])
    print(made)
    if arguments.page is not None:
        fill_page(arguments.page, {f"worth-{arguments.what}": made})


if __name__ == "__main__":
    main()
