"""What routers are worth: bits per byte on held-out text, and right answers, for many gates and an oracle.

    python -m research.scripts.router_study texts prose=PATH reference=PATH code=PATH -m A -m B [--out DIR]
        [--train N] [--check N] [--observe A] [--engine hf] [--rounds N] [--curve]
    python -m research.scripts.router_study answers arc_easy=FILE.jsonl … --fit FILE.jsonl -m A -m B [--out DIR]
        [--questions N] [--fit-questions N] [--unobserved]

`texts`: PATH is a folder, whose files are divided, or a file, whose first bytes train and whose last are held out.
Passages held out that repeat training text are left out. Intervals are bootstrap intervals over the passages held out,
paired with EM's weights where a difference is shown. `--curve` trains on an eighth, a quarter and a half of the text
too. `answers`: weights and gates are fitted to the questions of `--fit`, which must be others than those of the tasks,
as the training part of ARC is; all are judged on the tasks by the likeliest of the given answers, by the byte;
intervals are paired with the best member. `--unobserved` leaves out the gates that observe a member, and its second
pass; a later run without it adds them.

One member is in memory at a time. Scores are kept in mixlm's cache, some passages at a time, and a row in DIR as soon
as it is known: a run that was stopped goes on, and one on other texts or members needs another DIR.
Forwards a token are those of `mixture` on the check text: 1 for the observed member, the mean weight of each other, and
what the features `history` need (`router_features` says what that is, and why each feature is allowed). Two members
with one vocabulary, of which the first is observed, are compared with `defer` from the first to the second too, at
several prices of the second one's forwards. The row "cost" has the seconds of a forward of each member, and of each
gate.
`python -m research.scripts.router_page` puts the rows into docs/weights.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.fitting.deferral import DeferralScores, train_deferral
from mixlm.fitting.gate_trainer import GateKind
from mixlm.fitting.gates import train_gate, train_gate_on_inputs
from mixlm.fitting.likelihood import equal_weights, expectation_maximisation, simplex
from mixlm.resumable_log import ResumableLog
from mixlm.routing.gate_router import GROUPS, GateInputs
from mixlm.scoring.scores import Scores, concatenate, router_weights
from mixlm.types import Floats
from research.scripts.router_cost import gate_seconds
from research.scripts.router_features import LENGTHS, Kinds, decayed_sums, posterior, refreshes, stack
from research.scripts.router_scores import (
    Members,
    answers_job,
    describe,
    passages_job,
    readable,
    score_by_member,
    split_text,
    without_shared,
)

Weigh = Callable[[Scores], Floats]  # weights in front of each segment, or the same for all


@dataclass(frozen=True)
class Attempt:
    """A gate: its features, its kind, how often the past is scored, how many gates are averaged, the last one's price.

    price: of a forward of the last member, in nats.
    """

    groups: tuple[str, ...]
    kind: GateKind = "linear"
    block: int = 0
    gates: int = 1
    price: float = 0.0

    @property
    def observes(self) -> bool:
        return bool({"top_k", "hidden", "shapes"} & set(self.groups))


_D = ("text", "top_k", "hidden")
_EVERYTHING = (*_D, "shapes", "copies", "history")
GATES: Mapping[str, Attempt] = {
    "a: text, mlp": Attempt(("text",), "mlp"),
    "b: top_k, linear": Attempt(("top_k",)),
    "b: top_k, mlp": Attempt(("top_k",), "mlp"),
    "c: hidden, linear": Attempt(("hidden",)),
    "c: hidden, mlp": Attempt(("hidden",), "mlp"),
    "d: all, linear": Attempt(_D),
    "d: all, mlp": Attempt(_D, "mlp"),
    "e: history, linear": Attempt(("history",), block=256),
    "e: history, mlp": Attempt(("history",), "mlp", block=256),
    "e: history/64, mlp": Attempt(("history",), "mlp", block=64),
    "f: text, copies, mlp": Attempt(("text", "copies"), "mlp"),
    "f: text, copies, history, mlp": Attempt(("text", "copies", "history"), "mlp", block=256),
    "g: top_k, shapes, history, mlp": Attempt(("top_k", "shapes", "history"), "mlp", block=256),
    "h: everything, linear": Attempt(_EVERYTHING, block=256),
    "h: everything, mlp": Attempt(_EVERYTHING, "mlp", block=256),
    "h: everything/64, mlp": Attempt(_EVERYTHING, "mlp", block=64),
    "h: everything/64, 3 mlps": Attempt(_EVERYTHING, "mlp", block=64, gates=3),
    "i: history/1, mlp": Attempt(("history",), "mlp", block=1),
    "i: everything/1, mlp": Attempt(_EVERYTHING, "mlp", block=1),
}
# Of two members with one vocabulary, to compare with deferral from the first to the second at equal forwards.
PRICES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
PRICED = {f"k: router, price {price:g}": Attempt(("top_k",), "mlp", price=price) for price in PRICES}
DEFERRALS = {f"k: defer, gate, price {price:g}": price for price in PRICES}
THRESHOLDS = {f"k: defer, top {strength:g}": strength for strength in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97)}
POSTERIORS: Mapping[str, int] = {"e: posterior": 256, "e: posterior/64": 64, "i: posterior/1": 1}
_FIT = "questions to fit"
CURVE = ("a: text, linear", "d: all, linear", "d: all, mlp", "h: everything/64, mlp")
_POWERS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # of the likelihood of the past


def row_log(path: Path, about: Mapping[str, Any] | None = None) -> ResumableLog:
    """Open the rows of a part of the study, by name. about: what they depend on, to check it."""
    rows = ResumableLog(path, index="name", key="about", result="about")
    if about is not None:
        rows.check(about)
    return rows


def by_document(scores: Scores, logprobs: Floats) -> tuple[Floats, Floats]:
    """Return the bits and the bytes of each document: float64 (documents,)."""
    _, owner = np.unique(scores.passage_starts, return_inverse=True)
    sizes = np.bincount(owner, weights=scores.ends - scores.starts)
    return np.bincount(owner, weights=-logprobs / np.log(2)), sizes


def interval(bits: Floats, sizes: Floats, rounds: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of Σ bits / Σ bytes over documents."""
    picks = np.random.default_rng(seed).integers(len(bits), size=(rounds, len(bits)))
    low, high = np.quantile(bits[picks].sum(axis=1) / sizes[picks].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def forwards(weights: Floats, observed: int | None, refreshed: float) -> list[float]:
    """Return each member's expected forwards a token by `mixture`. refreshed: positions where all of them run."""
    mean = np.atleast_2d(weights).mean(axis=0)
    mean = mean + (1 - mean) * refreshed
    if observed is not None:
        mean[observed] = 1.0
    return [float(value) for value in mean]


def trained(name: str, train: Sequence[Scores], kinds: Kinds) -> Weigh:
    """Return the router of a row, trained on scored texts."""
    if name == "a: text, linear":
        return partial(router_weights, router=train_gate(train, GateInputs(("text",))))
    if name in POSTERIORS:
        return fitted_posterior(train, POSTERIORS[name])
    attempt = {**GATES, **PRICED}[name]
    prices = np.zeros(len(train[0].names))
    prices[-1] = attempt.price

    def inputs(scores: Scores) -> Any:
        return stack(scores, attempt.groups, attempt.block, kinds)

    gates = [
        train_gate_on_inputs(train, inputs, attempt.kind, prices=prices if attempt.price else None, seed=seed)
        for seed in range(attempt.gates)
    ]

    def weigh(scores: Scores) -> Floats:
        x = inputs(scores)
        logs = sum(np.log(np.maximum(gate.weights(x), 1e-12)) for gate in gates) / len(gates)
        weights: Floats = np.exp(logs)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    return weigh


def fitted_posterior(train: Sequence[Scores], block: int) -> Weigh:
    """Return the posterior with the decay and the power that make the training text the most likely."""
    whole = concatenate(train)
    em = expectation_maximisation(whole).weights
    sums = decayed_sums(whole, block)
    choices = [(length, power) for length in range(len(LENGTHS)) for power in _POWERS]

    def bits(choice: tuple[int, float]) -> float:
        return whole.bits_per_byte(whole.mixture(posterior(sums, em, *choice)))

    best = min(choices, key=bits)
    return lambda scores: posterior(decayed_sums(scores, block), em, *best)


def study_texts(
    members: Members, train: Mapping[str, Scores], check: Mapping[str, Scores], arguments: Any
) -> list[dict[str, Any]]:
    """Return a row for each way to weigh the members, and print it."""
    about = {
        "members": list(members.names),
        "sizes": list(members.sizes),
        "train": describe(train),
        "check": describe(check),
        "observe": members.names[members.observed],
    }
    rows = row_log(arguments.out / "texts.jsonl", about)
    whole, held = concatenate(list(train.values())), concatenate(list(check.values()))
    em = expectation_maximisation(whole).weights
    base, sizes = by_document(held, held.mixture(em))

    def row(logprobs: Floats, weights: Floats, observed: int | None = None, refreshed: float = 0.0) -> dict[str, Any]:
        bits, _ = by_document(held, logprobs)
        ends = np.cumsum([len(part.ends) for part in check.values()])[:-1]
        parts = zip(check.items(), np.split(logprobs, ends), strict=True)
        return {
            "bits": float(bits.sum() / sizes.sum()),
            "interval": interval(bits, sizes, arguments.rounds),
            "minus_em": interval(bits - base, sizes, arguments.rounds),
            "texts": {name: part.bits_per_byte(own) for (name, part), own in parts},
            "forwards": forwards(weights, observed, refreshed),
        }

    def deferred(logprobs: Floats, second: float) -> dict[str, Any]:
        return row(logprobs, np.array([0.0, second]), observed=0)

    def gated(price: float) -> dict[str, Any]:
        gate = train_deferral(list(train.values()), "mlp", price=price)
        return deferred(pair.deferred(gate), 1 - float(pair.kept(gate).mean()))

    def by_top(strength: float) -> dict[str, Any]:
        logprobs, kept = pair.by_top(strength)
        return deferred(logprobs, 1 - kept)

    def routed(name: str, texts: Sequence[Scores]) -> dict[str, Any]:
        weights = trained(name, texts, members.kinds)(held)
        attempt = {**GATES, **PRICED}.get(name)
        block = attempt.block if attempt is not None else POSTERIORS.get(name, 0)
        observed = members.observed if attempt is not None and attempt.observes else None
        return row(held.mixture(weights), weights, observed, refreshes(held, block) if block else 0.0)

    def fixed(weights: Floats) -> dict[str, Any]:
        return row(held.mixture(weights), weights)

    def own() -> dict[str, Any]:
        weights = np.concatenate(
            [
                np.tile(expectation_maximisation(train[name]).weights, (len(part.ends), 1))
                for name, part in check.items()
            ]
        )
        return row(held.mixture(weights), weights)

    oracle = held.logprobs.max(axis=1)
    chosen = np.eye(len(em))[held.logprobs.argmax(axis=1)]
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(fixed, np.eye(len(em))[i]) for i, name in enumerate(members.names)
    }
    ways |= {
        "equal": lambda: fixed(equal_weights(held)),
        "EM": lambda: fixed(em),
        "oracle": lambda: row(oracle, chosen),
    }
    ways |= {"EM of each text": own}
    ways |= {name: partial(routed, name, list(train.values())) for name in ("a: text, linear", *POSTERIORS, *GATES)}
    if held.unit == "token" and len(members.names) == 2 and members.observed == 0:
        pair = DeferralScores.of(held)
        ways |= {name: partial(routed, name, list(train.values())) for name in PRICED}
        ways |= {name: partial(gated, price) for name, price in DEFERRALS.items()}
        ways |= {name: partial(by_top, strength) for name, strength in THRESHOLDS.items()}
    out, known = [], {name: rows.get_or_make(name, about, ways[name]) for name in ("EM", "oracle")}
    best, top = known["EM"]["bits"], known["oracle"]["bits"]
    for name, make in ways.items():
        out.append(rows.get_or_make(name, about, make))
        item = out[-1]
        closed = (best - item["bits"]) / (best - top)
        spent = " ".join(f"{value:.2f}" for value in item["forwards"])
        print(
            f"{item['name']:30} {item['bits']:.4f} ({item['interval'][0]:.4f} to {item['interval'][1]:.4f})  minus EM "
            f"{item['minus_em'][0]:+.4f} to {item['minus_em'][1]:+.4f}  closed {closed:+.1%}  forwards {spent}",
            flush=True,
        )
    cost = rows.get_or_make("cost", about, partial(costs, members))
    for name, share in shares(cost, out).items():
        print(f"{name}: the gate takes {cost['gates'][name] * 1e6:.0f} µs, {share:.2%} of a token's time", flush=True)
    if arguments.curve:
        for share in (8, 4, 2):
            part = [first_documents(scores, share) for scores in train.values()]
            for name in CURVE:
                item = rows.get_or_make(f"{name}, 1/{share} of the text", about, partial(routed, name, part))
                print(f"{item['name']:50} {item['bits']:.4f}", flush=True)
    return out


def costs(members: Members) -> dict[str, Any]:
    """Return the seconds of a forward of each member, and of each gate that mixlm can run."""
    size = max(len(members.kinds), 1)
    names = [
        members.names[members.observed],
        *(name for name in members.names if name != members.names[members.observed]),
    ]
    gates = {
        name: gate_seconds(names, attempt.groups, attempt.kind, size, members.hidden)
        for name, attempt in GATES.items()
        if set(attempt.groups) <= set(GROUPS)
    }
    return {"seconds": list(members.seconds), "gates": gates}


def shares(cost: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return which share of a token's time each gate takes: its own over that of the row's forwards and its own."""
    out = {}
    for row in rows:
        if (gate := cost["gates"].get(row["name"])) is not None:
            models = float(np.dot(row["forwards"], cost["seconds"]))
            out[row["name"]] = gate / (gate + models)
    return out


def first_documents(scores: Scores, share: int) -> Scores:
    """Return the first of a text's passages, one of `share` of them and at least one."""
    starts = np.unique(scores.passage_starts)
    return scores.select(scores.passage_starts < np.append(starts, np.inf)[max(len(starts) // share, 1)])


def texts(arguments: Any) -> None:
    """Compare routers on texts."""
    parts: dict[str, list[bytes]] = {}
    for given in arguments.inputs:
        name, _, path = given.partition("=")
        parts[f"{name}, train"], parts[f"{name}, check"] = split_text(Path(path), arguments.train, arguments.check)
    kept = readable(arguments.model, arguments.engine, parts)
    parts = {name: list(compress(part, kept[name])) for name, part in parts.items()}
    train = [data for name, part in parts.items() if name.endswith(", train") for data in part]
    for name in [name for name in parts if name.endswith(", check")]:
        parts[name], dropped = without_shared(train, parts[name])
        if dropped:
            print(f"{name}: {dropped} passages left out that repeat training text", flush=True)
    jobs = {name: passages_job(part) for name, part in parts.items()}
    members, scores = score_by_member(arguments.model, arguments.engine, arguments.observe, jobs)
    names = [given.partition("=")[0] for given in arguments.inputs]
    study_texts(
        members,
        {name: scores[f"{name}, train"] for name in names},
        {name: scores[f"{name}, check"] for name in names},
        arguments,
    )


Question = tuple[str, list[str], int]  # a prompt, its choices, and the right one


def read_questions(path: Path, limit: int) -> list[Question]:
    """Return the first questions of a file as those of ARC and MMLU."""
    out = []
    for line in path.read_text().splitlines()[:limit]:
        raw = json.loads(line)
        choices = raw["choices"]
        if isinstance(choices, dict):
            texts_of, right = choices["text"], choices["label"].index(raw["answerKey"])
        else:
            texts_of, right = choices, int(raw["answer"])
        out.append((f"Question: {raw['question']}\nAnswer:", [f" {choice}" for choice in texts_of], right))
    return out


class Answers:
    """The scored answers of questions.

    Attributes:
        scores: Of all answers.
        right_scores: Of the right ones.
        right: The number of each question's right answer.
    """

    def __init__(self, scores: Scores, questions: Sequence[Question]) -> None:
        self.scores = scores
        self.right = [right for _, _, right in questions]
        sizes = [len(choices) for _, choices, _ in questions]
        self._question = np.repeat(np.arange(len(questions)), sizes)
        _, answer = np.unique(scores.passage_starts, return_inverse=True)
        self.right_scores = scores.select(np.isin(answer, np.cumsum([0, *sizes])[:-1] + self.right))

    def correct(self, weigh: Weigh) -> list[bool]:
        """Return whether the likeliest answer, by the byte, is the right one."""
        bits, sizes = by_document(self.scores, self.scores.mixture(weigh(self.scores)))
        values = -bits / np.maximum(sizes, 1)
        picked = [int(np.argmax(values[self._question == number])) for number in range(len(self.right))]
        return [answer == right for answer, right in zip(picked, self.right, strict=True)]

    def best_weights(self, step: float = 0.1) -> Floats:
        """Return the fixed weights of a grid under which most answers are right, and then most likely."""

        def quality(weights: Floats) -> tuple[int, float]:
            right = self.right_scores
            return sum(self.correct(lambda _: weights)), -right.bits_per_byte(right.mixture(weights))

        return max(simplex(len(self.scores.names), step), key=quality)


def answers(arguments: Any) -> None:
    """Compare routers on questions with given answers."""
    tasks = {given.partition("=")[0]: Path(given.partition("=")[2]) for given in arguments.inputs}
    questions = {name: read_questions(path, arguments.questions) for name, path in tasks.items()}
    known = {prompt for task in questions.values() for prompt, _, _ in task}
    fitted = [item for item in read_questions(arguments.fit, arguments.fit_questions) if item[0] not in known]
    questions = {_FIT: fitted, **questions}
    every = {
        name: [choice.encode() for _, choices, _ in task for choice in choices] for name, task in questions.items()
    }
    for name, kept in readable(arguments.model, arguments.engine, every).items():
        own = iter(kept)
        questions[name] = [item for item in questions[name] if all([next(own) for _ in item[1]])]  # noqa: C419
    jobs = {
        name: answers_job([(prompt, choice) for prompt, choices, _ in task for choice in choices])
        for name, task in questions.items()
    }
    members, scores = score_by_member(
        arguments.model, arguments.engine, arguments.observe, jobs, states=not arguments.unobserved
    )
    scored = {name: Answers(scores[name], task) for name, task in questions.items()}
    train = scored.pop(_FIT)
    print(f"fitted on {len(train.right)} questions", flush=True)
    ways = ways_to_weigh(members, train)
    for name, check in scored.items():
        report_answers(members, name, train, check, ways, arguments)


def ways_to_weigh(members: Members, train: Answers) -> dict[str, Callable[[], Weigh]]:
    """Return what makes each way to weigh from the questions to fit."""
    count = len(members.names)

    def fixed(weights: Floats) -> Weigh:
        return lambda _: weights

    ways: dict[str, Callable[[], Weigh]] = {
        name: partial(fixed, np.eye(count)[i]) for i, name in enumerate(members.names)
    }
    ways |= {
        "equal": lambda: equal_weights,
        "EM": lambda: fixed(expectation_maximisation(train.right_scores).weights),
        "grid over accuracy": lambda: fixed(train.best_weights()),
    }
    unobserved = train.scores.observed is None
    gates = ["a: text, linear", *(name for name, gate in GATES.items() if not (unobserved and gate.observes))]
    ways |= {name: partial(trained, name, [train.right_scores], members.kinds) for name in gates}
    return {name: cache(make) for name, make in ways.items()}


def report_answers(
    members: Members,
    task: str,
    train: Answers,
    check: Answers,
    ways: Mapping[str, Callable[[], Weigh]],
    arguments: Any,
) -> None:
    """Print the accuracy of each way to weigh."""
    about = {
        "members": list(members.names),
        "sizes": list(members.sizes),
        "fit": [arguments.fit.name, len(train.right)],
        "check": len(check.right),
        "observe": members.names[members.observed],
    }
    rows = row_log(arguments.out / f"{task}.jsonl", about)

    def judge(name: str) -> dict[str, Any]:
        weigh, attempt = ways[name](), GATES.get(name)
        block = attempt.block if attempt is not None else 0
        observed = members.observed if attempt is not None and attempt.observes else None
        refreshed = refreshes(check.scores, block) if block else 0.0
        correct = "".join("01"[right] for right in check.correct(weigh))
        return {"correct": correct, "forwards": forwards(weigh(check.scores), observed, refreshed)}

    out = [rows.get_or_make(name, about, partial(judge, name)) for name in ways]
    best = max(out[: len(members.names)], key=lambda row: right_answers(row).sum())
    for row in out:
        difference = right_answers(row) - right_answers(best)
        low, high = interval(difference, np.ones(len(difference)), arguments.rounds)
        print(
            f"{task} {row['name']:30} {right_answers(row).sum():.0f} of {len(check.right)}  minus {best['name']} "
            f"{difference.mean():+.1%} ({low:+.1%} to {high:+.1%})",
            flush=True,
        )


def right_answers(row: Mapping[str, Any]) -> Floats:
    """Return 1 for each question that a row of the study of answers has right, and 0 for the others: (questions,)."""
    return np.array([*row["correct"]], dtype=float)


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what studies of texts and of answers have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("texts", "answers"))
    parser.add_argument("inputs", nargs="+", metavar="NAME=PATH")
    parser.add_argument("-m", "--model", action="append", required=True)
    parser.add_argument("--engine", default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=int, help="bytes of each text to train on")
    parser.add_argument("--check", type=int, help="bytes of each text that are held out")
    parser.add_argument("--questions", type=int, help="of each task")
    parser.add_argument("--fit", type=Path, help="questions that are not of the tasks, to fit to")
    parser.add_argument("--fit-questions", type=int, help="how many of them")
    return parser


def parse_study(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a study. Ends the program where they do not fit."""
    arguments = parser.parse_args(given)
    if arguments.what == "answers" and arguments.fit is None:
        parser.error("answers need --fit FILE.jsonl: questions that are not of the tasks")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Run a part of the study."""
    parser = study_parser(__doc__)
    parser.set_defaults(out=Path("router-study"), train=200_000, check=100_000, questions=400, fit_questions=400)
    parser.add_argument("--observe", default=None, help="the observed member; by default the smallest")
    parser.add_argument("--unobserved", action="store_true", help="of answers: no gates that observe a member")
    parser.add_argument("--rounds", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--curve", action="store_true", help="train on parts of the text too")
    arguments = parse_study(parser, given)
    texts(arguments) if arguments.what == "texts" else answers(arguments)


if __name__ == "__main__":
    main()
