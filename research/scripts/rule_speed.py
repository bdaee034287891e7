"""What combination rules cost: forwards a token and tokens/s of `layered` against `conventional`, in one run.

python -m research.scripts.rule_speed MODEL MODEL [--rules A,B] [--tokens N] [--repeats N] [--dtype NAME] [--json FILE]

Each repeat continues every prompt (prose, a reference, code) by each method in turn, so that a change of the machine's
speed affects all of them; the first member alone (`single`) is one of them. Figures are those of all tokens of a
repeat; shown is the median over repeats. Beside what is measured stands what the formulas predict at the positions of
texts of the rule: the mean mass with which the first member decides alone (`layered` without drafts then takes
`1 + (1 - mass) (n - 1)` forwards), and how often the sample of a draft is the rule's with the same noise,
`Σ_u 1 / Σ_v max(p_v / p_u, q_v / q_u)`.
`guidance` takes the first model twice, in its chat template, after `--system` and after `--negative`.

With --json, a row is written as soon as it is measured, and a run that was stopped goes on after its last one. The
file has a line of JSON a rule; `rule_page` puts it into the docs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mixlm.benchmark.report import environment
from mixlm.config import parse_config
from mixlm.engines import Engine, EngineSpec
from mixlm.ensemble import Ensemble
from mixlm.generation.prompt import Prompt
from mixlm.loading import load_config
from mixlm.resumable_log import ResumableLog
from mixlm.types import Floats, Usage
from research.scripts.measuring import measured_on

PROMPTS = (
    "The ferry left the harbour a little after six, when the fog had lifted from the water and",
    "A hash table is a data structure that",
    'def mean(values: list[float]) -> float:\n    """Return the arithmetic mean of the values."""\n',
)
SYSTEM = "Answer in one short sentence."
NEGATIVE = "Answer at length, and go into every detail."
RULES: dict[str, dict[str, Any]] = {
    "union-top-k": {"rule": "union-top-k", "top_k": 10, "temperature": 1.0},
    "mean-top-5": {"rule": "mean-then-truncate", "top_k": 5, "temperature": 1.0},
    "mean-T-0.7": {"rule": "mean-then-temper", "top_k": 0, "temperature": 0.7},
    "max": {"rule": "max", "top_k": 0, "temperature": 1.0},
    "power": {"rule": "power", "strength": 2.0, "top_k": 0, "temperature": 1.0},
    "geometric": {"rule": "geometric", "top_k": 0, "temperature": 1.0},
    "min": {"rule": "min", "top_k": 0, "temperature": 1.0},
    "contrastive": {"rule": "contrastive", "top_k": 0, "temperature": 1.0},
    "guidance": {"rule": "guidance", "top_k": 0, "temperature": 1.0},
    "vote": {"rule": "vote", "top_k": 0, "temperature": 1.0},
    "defer": {"rule": "defer", "top_k": 0, "temperature": 1.0},
}
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0}
_TOP = 128  # symbols that the prediction of acceptance looks at
_SETTINGS = (
    "models",
    "tokens",
    "repeats",
    "prompts",
    "system",
    "negative",
    "engine",
    "dtype",
)  # of what rows depend on


def measured(
    ensemble: Ensemble, options: dict[str, Any], tokens: int, repeats: int, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Continue the prompts by all methods in turn; medians over the repeats."""
    methods = {
        "single": {**PLAIN, "method": "single", "raw": options["raw"]},
        "conventional": {**options, "method": "conventional"},
        "layered": {**options, "method": "layered"},
        "no draft": {**options, "method": "layered", "draft": "none"},
    }
    for call in methods.values():
        ensemble.generate(prompts[0], seed=0, max_tokens=4, ignore_end=True, **call)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for repeat in range(repeats):
        usages: dict[str, list[Usage]] = {name: [] for name in methods}
        for prompt in prompts:
            for name, call in methods.items():
                completion = ensemble.generate(prompt, seed=repeat, max_tokens=tokens, ignore_end=True, **call)
                usages[name].append(completion.usage)
        for name in methods:
            runs[name].append(_figures(usages[name]))
    return {name: _medians(values) for name, values in runs.items()}


def _figures(usages: Sequence[Usage]) -> dict[str, float]:
    """Return the figures of several completions, by all their tokens."""
    tokens = sum(usage.tokens for usage in usages)
    decoding = sum(usage.seconds - usage.seconds_to_first_token for usage in usages)
    figures = {
        "forwards": sum(member.forwards for usage in usages for member in usage.members.values()) / tokens,
        "tokens_per_second": (tokens - len(usages)) / max(decoding, 1e-9),
    }
    if drafted := sum(usage.drafted for usage in usages):
        figures["accepted"] = sum(usage.accepted for usage in usages) / drafted
    return figures


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = {key: None for run in runs for key in run}  # a repeat without proposals has no acceptance
    return {key: median(run[key] for run in runs if key in run) for key in keys}


def predicted(ensemble: Ensemble, options: dict[str, Any], tokens: int, prompts: Sequence[str]) -> dict[str, float]:
    """Return the mean mass that the first member decides, and how often a draft is right, by the formulas."""
    figures = [_predicted(ensemble, options, tokens, prompt) for prompt in prompts]
    return {key: float(np.mean([figure[key] for figure in figures])) for key in figures[0]}


def _predicted(ensemble: Ensemble, options: dict[str, Any], tokens: int, prompt: str) -> dict[str, float]:
    settings = ensemble.settings(method="layered", **options)
    rule = settings.combination
    assert rule is not None
    after = settings.combined_sampling({})
    rule = rule if after is None else rule.with_sampling(after)
    masses, accepted, text = [], [], ""
    completion = ensemble.generate(prompt, seed=1, max_tokens=tokens, ignore_end=True, **options)
    plain = {**PLAIN, "method": "conventional", "rule": "average"}
    for token in completion.tokens:
        # All that members may say, whatever the rule excludes.
        if options["raw"]:
            following = ensemble.distribution(prompt + text, raw=True, **plain)
        else:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            following = ensemble.distribution(turns if text else prompt, continue_final_message=bool(text), **plain)
        order = np.argsort(following.symbols)
        probs, weights = following.members[:, order], following.weights
        combined = rule.combine(probs, weights)
        coin = rule.first_member(weights)
        if coin is not None:
            rows = range(len(weights))
            masses.append(sum(coin[i] * rule.first_distribution(probs[i], weights, i).sum() for i in rows))
        else:
            bounds = [rule.envelope(probs, weights, [i]) for i in range(len(weights))]
            masses.append(max(0.0 if bound is None else float(bound.sum()) for bound in bounds))
        accepted.append(max(_coupled(row, combined) for row in probs))
        text += token.text
    stopped = float(np.mean(masses))
    return {
        "stopped": stopped,
        "forwards": 1 + (1 - stopped) * (len(weights) - 1),
        "accepted": float(np.mean(accepted)),
    }


def _coupled(draft: Floats, target: Floats) -> float:
    """Return how often samples of two distributions are equal with the same Gumbel noise, on the likeliest symbols."""
    top = np.argsort(-np.maximum(draft, target))[:_TOP]
    top = top[(draft[top] > 0) & (target[top] > 0)]
    p, q = draft[top], target[top]
    outside = np.array([max(0.0, 1 - p.sum()), max(0.0, 1 - q.sum())])
    ratios = np.maximum(p[None] / p[:, None], q[None] / q[:, None]).sum(axis=1) + outside[0] / p + outside[1] / q
    return float((1 / ratios).sum())


class Ensembles:
    """The ensemble of the models, and for guidance the first of them after two system texts; weights are shared."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._member = {"engine": arguments.engine, "dtype": arguments.dtype}
        self._models: list[str] = arguments.models
        self._systems: tuple[str, str] = (arguments.system, arguments.negative)
        self._engines: dict[EngineSpec, Engine] = {}
        self._loaded: dict[bool, Ensemble] = {}

    @property
    def engines(self) -> list[Engine]:
        """What is loaded."""
        return list(self._engines.values())

    def of(self, rule: str) -> Ensemble:
        """Return the ensemble for a rule."""
        is_guidance = rule == "guidance"
        if is_guidance not in self._loaded:
            members = [{"model": model} for model in self._models]
            if is_guidance:
                members = [{"model": self._models[0], "system": system} for system in self._systems]
            raw = {"members": [{**member, **self._member} for member in members]}
            self._loaded[is_guidance] = load_config(parse_config(raw, "rule_speed"), engines=self._engines)
        return self._loaded[is_guidance]


def _line(name: str, row: dict[str, Any]) -> str:
    layered, undrafted, formulas = row["layered"], row["no draft"], row["predicted"]
    speed = {method: max(row[method]["tokens_per_second"], 1e-9) for method in ("single", "conventional")}
    return (
        f"{name:14} {layered['forwards']:9.2f} {undrafted['forwards']:9.2f} {formulas['forwards']:9.2f} "
        f"{layered.get('accepted', float('nan')):9.2f} {formulas['accepted']:9.2f} "
        f"{layered['tokens_per_second'] / speed['conventional']:8.2f}x "
        f"{undrafted['tokens_per_second'] / speed['conventional']:8.2f}x "
        f"{speed['single']:9.1f} {speed['single'] / max(layered['tokens_per_second'], 1e-9):8.2f}x"
    )


def row_log(path: Path | None) -> ResumableLog:
    """Open the rows of rules: by name, each with what it depends on."""
    return ResumableLog(path, index="rule", key="about", result="layered")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rules that the file does not have yet, and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the largest first: the expert of contrastive")
    parser.add_argument("--rules", default=",".join(RULES), help="of " + ", ".join(RULES))
    parser.add_argument("--tokens", type=int, default=96, help="of each completion")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prompt", dest="prompts", action="append", help="can be repeated")
    parser.add_argument("--system", default=SYSTEM, help="for guidance: the system text of the prompt")
    parser.add_argument("--negative", default=NEGATIVE, help="for guidance: the system text of the negative prompt")
    parser.add_argument("--engine", default="hf", help="llama.cpp reports the likeliest tokens only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    arguments.prompts = arguments.prompts or list(PROMPTS)
    names = arguments.rules.split(",")
    if unknown := [name for name in names if name not in RULES]:
        parser.error(f"there is no rule {unknown[0]!r} here; the rules are {', '.join(RULES)}")
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    rows, about = row_log(arguments.json), measured_on(settings)
    rows.check(about)
    ensembles = Ensembles(arguments)
    heads = ("forwards", "no draft", "predicted", "accepted", "predicted", "speed", "no draft", "single/s", "of single")
    print(f"{'rule':14} " + " ".join(f"{head:>9}" for head in heads), flush=True)
    for name in names:
        if rows.get(name, about) is None:
            options = {**RULES[name], "raw": name != "guidance"}
            try:
                ensemble = ensembles.of(name)
                runs = measured(ensemble, options, arguments.tokens, arguments.repeats, arguments.prompts)
                formulas = predicted(ensemble, options, min(arguments.tokens, 24), arguments.prompts)
            except Exception as error:
                print(f"{name:14} {error}", flush=True)
                continue
            where = environment(ensembles.engines, settings)
            rest = {key: value for key, value in where.items() if key not in about}
            rows.add(name, about, {"options": options, **runs, "predicted": formulas, "environment": rest})
        print(_line(name, rows.records[name]), flush=True)


if __name__ == "__main__":
    main()
