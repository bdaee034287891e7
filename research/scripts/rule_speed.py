"""What combination rules cost: forwards a token and tokens/s of `layered` against `conventional`, in one run.

python -m research.scripts.rule_speed MODEL MODEL [--rules A,B] [--tokens N] [--repeats N] [--prompt TEXT] [--json FILE]

Beside what is measured stands what the formulas predict at the positions of one text of the rule: the mean mass with
which the first member decides alone (`layered` without drafts then takes `1 + (1 - mass) (n - 1)` forwards), and how
often the sample of a draft is the rule's with the same noise, `Σ_u 1 / Σ_v max(p_v / p_u, q_v / q_u)`. Methods are run
in turn, so that a change of the machine's speed affects all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mixlm import load
from mixlm.ensemble import Ensemble
from mixlm.types import Floats

PROMPT = "The ferry left the harbour a little after six, when the fog had lifted from the water and"
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


def measured(ensemble: Ensemble, options: dict[str, Any], tokens: int, repeats: int, prompt: str) -> dict[str, Any]:
    """Run conventional, layered and layered without drafts in turn; medians over the repeats after the first."""
    methods = {
        "conventional": {"method": "conventional"},
        "layered": {"method": "layered"},
        "no draft": {"method": "layered", "draft": "none"},
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            call: dict[str, Any] = {**options, **method}
            usage = ensemble.generate(prompt, raw=True, seed=repeat, max_tokens=tokens, ignore_end=True, **call).usage
            forwards = sum(member.forwards for member in usage.members.values()) / usage.tokens
            accepted = usage.accepted / usage.drafted if usage.drafted else float("nan")
            if repeat:
                speed = usage.tokens_per_second
                runs[name].append({"forwards": forwards, "tokens_per_second": speed, "accepted": accepted})
    return {name: {key: median(run[key] for run in values) for key in values[0]} for name, values in runs.items()}


def predicted(ensemble: Ensemble, options: dict[str, Any], tokens: int, prompt: str) -> dict[str, float]:
    """Return the mean mass that the first member decides, and how often a draft is right, by the formulas."""
    settings = ensemble.settings(method="layered", **options)
    rule = settings.combination
    assert rule is not None
    after = settings.combined_sampling({})
    rule = rule if after is None else rule.with_sampling(after)
    masses, accepted, text = [], [], prompt
    completion = ensemble.generate(prompt, raw=True, seed=1, max_tokens=tokens, ignore_end=True, **options)
    for token in completion.tokens:
        # All that members may say, whatever the rule excludes.
        following = ensemble.distribution(text, raw=True, method="conventional", rule="average", **PLAIN)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--engine", default="hf", help="llama.cpp reports the likeliest tokens only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ensemble = load(*arguments.models, engine=arguments.engine)
    report = {}
    heads = ("forwards", "no draft", "predicted", "accepted", "predicted", "speed", "no draft")
    print(f"{'rule':14} " + " ".join(f"{head:>9}" for head in heads))
    for name in arguments.rules.split(","):
        options = RULES[name]
        try:
            runs = measured(ensemble, options, arguments.tokens, arguments.repeats, arguments.prompt)
            formulas = predicted(ensemble, options, min(arguments.tokens, 32), arguments.prompt)
        except Exception as error:
            print(f"{name:14} {error}")
            continue
        report[name] = {"options": options, **runs, "predicted": formulas}
        layered, plain = runs["layered"], runs["conventional"]
        ratio, plain_ratio = (
            run["tokens_per_second"] / max(plain["tokens_per_second"], 1e-9) for run in (layered, runs["no draft"])
        )
        print(
            f"{name:14} {layered['forwards']:9.2f} {runs['no draft']['forwards']:9.2f} {formulas['forwards']:9.2f} "
            f"{layered['accepted']:9.2f} {formulas['accepted']:9.2f} {ratio:8.2f}x {plain_ratio:8.2f}x"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
