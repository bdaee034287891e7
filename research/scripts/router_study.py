"""What routers are worth: bits per byte on held-out text, and right answers, for gates on (a) to (d) and an oracle.

    python -m research.scripts.router_study texts prose=FILE reference=FILE code=FILE -m A -m B [--out DIR]
        [--train N] [--check N] [--observe A] [--engine hf] [--rounds N] [--curve]
    python -m research.scripts.router_study answers arc_easy=FILE.jsonl … -m A -m B [--out DIR] [--questions N]

`texts`: the first bytes of each file train, the last bytes are held out; passages are documents. Intervals are
bootstrap intervals over the passages held out, paired with EM's weights where a difference is shown. `--curve` trains
on an eighth, a quarter, … of the text too. `answers`: weights and gates are fitted to the right answers of the even
questions, and all are judged on the odd ones by the likeliest of the given answers; intervals are paired with the best
member. Scores are kept in mixlm's cache, a row in DIR as soon as it is known: a run that was stopped goes on.
Forwards a token are those of `mixture` on the check text: 1 for the observed member, the mean weight of each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

import mixlm
from mixlm.ensemble import Ensemble
from mixlm.fitting.gates import GateKind, choose_inputs, train_gate, untrained
from mixlm.fitting.likelihood import equal_weights, expectation_maximisation, fit_router
from mixlm.routing import Router
from mixlm.routing.observation import observed_by
from mixlm.scoring.score import identity, score, score_answers
from mixlm.scoring.scores import Scores, concatenate, router_weights
from mixlm.types import Floats

GATES: Mapping[str, tuple[tuple[str, ...], GateKind]] = {
    "a: text, mlp": (("text",), "mlp"),
    "b: top_k, linear": (("top_k",), "linear"),
    "b: top_k, mlp": (("top_k",), "mlp"),
    "c: hidden, linear": (("hidden",), "linear"),
    "c: hidden, mlp": (("hidden",), "mlp"),
    "d: all, linear": (("text", "top_k", "hidden"), "linear"),
    "d: all, mlp": (("text", "top_k", "hidden"), "mlp"),
}
_CHUNK = 20  # questions that are scored, and cached, at once


class Rows:
    """The rows that are known, one JSON object a line; a row that is known is not computed again."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, json.loads(json.dumps(about))
        lines = path.read_text().splitlines() if path.is_file() else []
        self._known = {row["name"]: row for row in map(json.loads, lines) if row["about"] == self._about}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self._known:
            self._known[name] = {"name": name, "about": self._about, **make()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(self._known[name]) + "\n")
        row: dict[str, Any] = self._known[name]
        return row


def observing(ensemble: Ensemble, observe: str | None) -> Ensemble:
    """Return the ensemble with a router that observes all that a gate can look at."""
    return ensemble.with_router(untrained(ensemble.names, choose_inputs(ensemble, ("top_k", "hidden"), observe)))


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


def forwards(weights: Floats, router: Router | None) -> list[float]:
    """Return each member's expected forwards a token by `mixture`."""
    mean = weights.mean(axis=0)
    if router is not None and (observes := observed_by(router)) is not None:
        mean[observes.member] = 1.0
    return [float(value) for value in mean]


def trained(name: str, train: Sequence[Scores], ensemble: Ensemble, observe: str | None) -> Router:
    """Return the router of a row, trained on scored texts."""
    if name == "a: text, linear":
        return fit_router(train)
    groups, kind = GATES[name]
    inputs = choose_inputs(ensemble, groups, observe if groups != ("text",) else None)
    return train_gate(train, inputs, kind).router


def study_texts(
    ensemble: Ensemble, train: Mapping[str, Scores], check: Mapping[str, Scores], arguments: Any
) -> list[dict[str, Any]]:
    """Return a row for each way to weigh the members, and print it."""
    about = {
        "members": list(ensemble.names),
        "train": {name: part.size for name, part in train.items()},
        "check": {name: part.size for name, part in check.items()},
        "observe": arguments.observe,
    }
    rows = Rows(arguments.out / "texts.jsonl", about)
    whole, held = concatenate(list(train.values())), concatenate(list(check.values()))
    em = expectation_maximisation(whole).weights
    base, sizes = by_document(held, held.mixture(em))

    def row(logprobs: Floats, weights: Floats, router: Router | None = None) -> dict[str, Any]:
        bits, _ = by_document(held, logprobs)
        ends = np.cumsum([len(part.ends) for part in check.values()])[:-1]
        parts = zip(check.items(), np.split(logprobs, ends), strict=True)
        return {
            "bits": float(bits.sum() / sizes.sum()),
            "interval": interval(bits, sizes, arguments.rounds),
            "minus_em": interval(bits - base, sizes, arguments.rounds),
            "texts": {name: part.bits_per_byte(own) for (name, part), own in parts},
            "forwards": forwards(weights, router),
        }

    def routed(name: str, texts: Sequence[Scores]) -> dict[str, Any]:
        router = trained(name, texts, ensemble, arguments.observe)
        weights = router_weights(held, router)
        return row(held.mixture(weights), weights, router)

    def fixed(weights: Floats) -> dict[str, Any]:
        return row(held.mixture(weights), weights[None])

    out = [rows.get(name, lambda i=i: fixed(np.eye(len(em))[i])) for i, name in enumerate(ensemble.names)]  # type: ignore[misc]
    out += [rows.get("equal", lambda: fixed(equal_weights(held))), rows.get("EM", lambda: fixed(em))]
    for name in ("a: text, linear", *GATES):
        out.append(rows.get(name, lambda name=name: routed(name, list(train.values()))))  # type: ignore[misc]
    oracle = held.logprobs.max(axis=1)
    out.append(rows.get("oracle", lambda: row(oracle, np.eye(len(em))[held.logprobs.argmax(axis=1)])))
    best, top = next(item for item in out if item["name"] == "EM")["bits"], out[-1]["bits"]
    for item in out:
        closed = (best - item["bits"]) / (best - top)
        spent = " ".join(f"{value:.2f}" for value in item["forwards"])
        print(
            f"{item['name']:22} {item['bits']:.4f} ({item['interval'][0]:.4f} to {item['interval'][1]:.4f})  minus EM "
            f"{item['minus_em'][0]:+.4f} to {item['minus_em'][1]:+.4f}  closed {closed:+.1%}  forwards {spent}",
            flush=True,
        )
    if arguments.curve:
        for share in (8, 4, 2):
            part = [first_documents(scores, share) for scores in train.values()]
            for name in ("a: text, linear", "d: all, linear", "d: all, mlp"):
                item = rows.get(f"{name}, 1/{share} of the text", lambda n=name, p=part: routed(n, p))  # type: ignore[misc]
                print(f"{item['name']:40} {item['bits']:.4f}", flush=True)
    return out


def first_documents(scores: Scores, share: int) -> Scores:
    """Return the first of a text's passages, one of `share` of them and at least one."""
    starts = np.unique(scores.passage_starts)
    return scores.select(scores.passage_starts < np.append(starts, np.inf)[max(len(starts) // share, 1)])


def texts(arguments: Any) -> None:
    """Compare routers on texts."""
    ensemble, models = load(arguments)
    watching = observing(ensemble, arguments.observe)
    train, check = {}, {}
    for given in arguments.inputs:
        name, _, path = given.partition("=")
        data = Path(path).read_bytes()
        if len(data) < arguments.train + arguments.check:
            raise SystemExit(f"{path} has {len(data)} bytes, fewer than {arguments.train} and {arguments.check}")
        parts = (data[: arguments.train], data[len(data) - arguments.check :])
        for into, part in zip((train, check), parts, strict=True):
            print(f"scoring {name}: {len(part)} bytes", flush=True)
            into[name] = score(watching, part.decode(errors="ignore"), identities=models)
    study_texts(ensemble, train, check, arguments)


def read_questions(path: Path, limit: int) -> list[tuple[str, list[str], int]]:
    """Return prompts, their choices and the right one, of the files of ARC and MMLU."""
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


def answers(arguments: Any) -> None:
    """Compare routers on questions with given answers."""
    ensemble, models = load(arguments)
    watching = observing(ensemble, arguments.observe)
    settings = ensemble.settings(raw=True)
    for given in arguments.inputs:
        name, _, path = given.partition("=")
        questions = read_questions(Path(path), arguments.questions)
        choices: list[list[Scores]] = []  # by question, the scores of each of its choices
        for first in range(0, len(questions), _CHUNK):
            part = questions[first : first + _CHUNK]
            pairs = [(prompt, choice) for prompt, texts_of, _ in part for choice in texts_of]
            scored = score_answers(watching, pairs, settings=settings, ends=False, identities=models)
            alone = iter(scored.select(scored.passage_starts == start) for start in np.unique(scored.passage_starts))
            choices += [[next(alone) for _ in texts_of] for _, texts_of, _ in part]
            print(f"{name}: {len(choices)} of {len(questions)} questions scored", flush=True)
        right = np.array([question[2] for question in questions])
        train = [choices[i][right[i]] for i in range(0, len(questions), 2)]
        report_answers(ensemble, name, (train, choices[1::2], right[1::2]), arguments)


def report_answers(
    ensemble: Ensemble,
    task: str,
    parts: tuple[Sequence[Scores], Sequence[Sequence[Scores]], npt.NDArray[np.int64]],
    arguments: Any,
) -> None:
    """Print the accuracy of each way to weigh. parts: answers to train on, choices and right ones to check."""
    train, check, right = parts
    about = {"members": list(ensemble.names), "train": len(train), "check": len(check), "observe": arguments.observe}
    rows = Rows(arguments.out / f"{task}.jsonl", about)
    whole = concatenate(train)

    def judge(weigh: Callable[[Scores], Floats]) -> dict[str, Any]:
        picked = []
        for options in check:
            values = [float(option.mixture(weigh(option)).sum()) / max(option.size, 1) for option in options]
            picked.append(int(np.argmax(values)))
        return {"correct": (np.array(picked) == right).tolist()}

    def routed(name: str) -> dict[str, Any]:
        router = trained(name, [whole], ensemble, arguments.observe)
        return judge(lambda option: router_weights(option, router))

    em = expectation_maximisation(whole).weights
    ways = {name: (lambda i=i: judge(lambda _: np.eye(len(em))[i])) for i, name in enumerate(ensemble.names)}
    ways |= {"equal": lambda: judge(equal_weights), "EM": lambda: judge(lambda _: em)}
    ways |= {name: (lambda name=name: routed(name)) for name in ("a: text, linear", *GATES)}
    out = [rows.get(name, cast("Callable[[], dict[str, Any]]", make)) for name, make in ways.items()]
    best = max(out[: len(ensemble.names)], key=lambda row: sum(row["correct"]))
    for row in out:
        difference = np.array(row["correct"], dtype=float) - np.array(best["correct"], dtype=float)
        low, high = interval(difference, np.ones(len(difference)), arguments.rounds)
        print(
            f"{task} {row['name']:22} {sum(row['correct'])} of {len(check)}  minus {best['name']} "
            f"{difference.mean():+.1%} ({low:+.1%} to {high:+.1%})",
            flush=True,
        )


def load(arguments: Any) -> tuple[Ensemble, list[str | None]]:
    """Return the ensemble, and what identifies each member's model in the cache of scores."""
    ensemble = mixlm.load(*arguments.model, engine=arguments.engine)
    return ensemble, [identity(model) for model in arguments.model]


def main(given: Sequence[str] | None = None) -> None:
    """Run a part of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("texts", "answers"))
    parser.add_argument("inputs", nargs="+", metavar="NAME=FILE")
    parser.add_argument("-m", "--model", action="append", required=True)
    parser.add_argument("--engine", default=None)
    parser.add_argument("--observe", default=None, help="the observed member; by default the smallest")
    parser.add_argument("--out", type=Path, default=Path("router-study"))
    parser.add_argument("--train", type=int, default=200_000, help="bytes of each text to train on")
    parser.add_argument("--check", type=int, default=100_000, help="bytes of each text that are held out")
    parser.add_argument("--rounds", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--curve", action="store_true", help="train on parts of the text too")
    parser.add_argument("--questions", type=int, default=800, help="of each task; half of them train")
    arguments = parser.parse_args(given)
    texts(arguments) if arguments.what == "texts" else answers(arguments)


if __name__ == "__main__":
    main()
