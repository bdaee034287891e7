"""Findings as Markdown: pure functions, with the paper's own numbers beside those of its ensembles."""

from __future__ import annotations

from collections.abc import Sequence

from mixlm.evaluation.results import Interval, Score
from research.paper import published
from research.paper.experiments import COLUMNS
from research.paper.findings import AccuracyFinding, Findings, SpeedFinding

SHORT = {"mixture": "ME", "conventional": "CE"}
_OWN_DISTRIBUTION = (
    "CE averages what each member leaves after its own truncation, the distribution that ME samples from. ± is half "
    "of a 95 % interval over seeds; in parentheses, the gain over the best single member."
)
_WEIGHTS = (
    "The paper's rows are of the weights that a search in steps of 0.1 found best, which its text does not give, and "
    "of prompts of its own; its single models are of an unnamed k. They are for comparison, not targets."
)
_PAIRED = (
    "ME minus CE in percentage points, each question averaged over its seeds: mean with its 95 % interval over "
    "questions, the p-value of no difference (signs flipped at random), and the questions on which ME did better and "
    "worse."
)
_SPEED = (
    "Tokens per second of decoding, after the prompt is read; in parentheses, the multiple of sequential CE. "
    "Single is the members alone, each for its share of the tokens: the most that ME could reach. CE (parallel) has "
    "each member on a device of its own, all asked at once."
)


def markdown(findings: Findings, *, image: str | None = None) -> str:
    """Return the whole report. image: the file of the figure, to be shown on top."""
    parts = [f"# {findings.title}"]
    if findings.reduced:
        parts.append(f"**{findings.reduced[0].upper()}{findings.reduced[1:]}.**")
    if image is not None:
        parts.append(f"![{findings.title}]({image})")
    if findings.accuracies:
        parts += _curves(findings) if findings.experiment.startswith("figure") else _accuracies(findings)
    if findings.differences:
        parts += ["## ME against CE", _PAIRED, _differences(findings)]
    if findings.speeds:
        parts += _speeds(findings)
    parts += _apart(findings)
    if findings.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in findings.notes)]
    parts += ["## Settings", _settings(findings)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are texts and whose others are numbers."""
    marks = [":--" if i < left else "--:" for i in range(len(heads))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, marks, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def method_name(method: str) -> str:
    """Return a method as tables call it."""
    return method.removeprefix("single:") if method.startswith("single:") else SHORT.get(method, method)


def task_name(task: str) -> str:
    """Return a task as tables call it: the paper's name, with the part of ARC, which the paper does not say."""
    name = COLUMNS.get(task, task)
    return f"{name} ({task.rpartition('_')[2]})" if name == "ARC" else name


def percent(score: Score) -> str:
    """Return an accuracy in percent with half of its interval."""
    half = "" if score.interval is None else f" ± {50 * (score.interval[1] - score.interval[0]):.2f}"
    return f"{100 * score.mean:.2f}{half}"


def span(interval: Interval | None, scale: float = 100) -> str:
    """Return an interval; nothing for none."""
    return "" if interval is None else f"{scale * interval[0]:+.2f} to {scale * interval[1]:+.2f}"


def _accuracies(findings: Findings) -> list[str]:
    parts = [f"Accuracy in percent. {_OWN_DISTRIBUTION}", _WEIGHTS]
    for label, names in findings.ensembles.items():
        mine = [accuracy for accuracy in findings.accuracies if accuracy.ensemble == label]
        rows = []
        for top_k, method in dict.fromkeys((finding.top_k, finding.score.method) for finding in mine):
            row = [f"{method_name(method)} (k = {top_k})"]
            for task in findings.tasks:
                score = findings.accuracy(label, method, top_k, task)
                row.append("" if score is None else percent(score.score) + _gain(findings, score))
                if names is not None:
                    row.append(_theirs(names, method, top_k, COLUMNS.get(task, "")))
            rows.append(row)
        heads = ["method"]
        for task in findings.tasks:
            heads += [task_name(task), *(["paper"] if names is not None else [])]
        weights = {
            finding.top_k: f"Weights {_weights(finding.weights)} (k = {finding.top_k})."
            for finding in mine
            if finding.weights
        }
        parts += [f"## {label}", " ".join(weights.values()), table(heads, rows)]
    return parts


def _gain(findings: Findings, finding: AccuracyFinding) -> str:
    """Return the gain over the best single member of the same ensemble, k and task; nothing for the singles."""
    alone = [
        accuracy.score.mean
        for accuracy in findings.accuracies
        if accuracy.score.method.startswith("single")
        and (accuracy.ensemble, accuracy.top_k, accuracy.score.task)
        == (finding.ensemble, finding.top_k, finding.score.task)
    ]
    score = finding.score
    return f" ({100 * (score.mean - max(alone)):+.2f})" if alone and not score.method.startswith("single") else ""


def _theirs(names: published.Names, method: str, top_k: int, task: str) -> str:
    if method.startswith("single:"):
        value = published.single(method.removeprefix("single:"), task)
        return "" if value is None else f"{value:.2f}"
    cell = published.accuracy(names, method, top_k, task)
    return "" if cell is None else f"{cell.value:.2f} ({cell.gain:+.2f})"


def _curves(findings: Findings) -> list[str]:
    rows = []
    for accuracy in findings.accuracies:
        about = (accuracy.ensemble, task_name(accuracy.score.task), SHORT[accuracy.score.method])
        rows.append([*about, f"{accuracy.weights[0]:g}", percent(accuracy.score), str(accuracy.score.count)])
    heads = ("ensemble", "task", "method", "λ", "accuracy, %", "questions")
    return [
        "λ is the weight of the first member of an ensemble. The paper's values are a plot only. ± is half of a 95 % "
        "interval over seeds.",
        table(heads, rows, left=3),
    ]


def _differences(findings: Findings) -> str:
    heads = ("ensemble", "task", "k", "weights", "difference", "95 % interval", "p", "questions", "better", "worse")
    rows = []
    for difference in findings.differences:
        pair = difference.pair
        about = (difference.ensemble, task_name(pair.task), str(difference.top_k), _weights(difference.weights))
        statistics = (f"{100 * pair.difference:+.2f}", span(pair.interval), f"{pair.p_value:.3g}")
        rows.append([*about, *statistics, str(pair.questions), str(pair.better), str(pair.worse)])
    return table(heads, rows, left=2)


def _speeds(findings: Findings) -> list[str]:
    if findings.experiment == "figure2":
        return ["## Speed", "Tokens per second; the paper's values are a plot only.", _speed_curves(findings)]
    parts = ["## Speed", _SPEED]
    for speed in findings.speeds:
        rows = [[f"single: {name}", _pace(speed, value)] for name, value in speed.single.items()]
        rows += [["single", _pace(speed, speed.alone)], ["CE (sequential)", _pace(speed, speed.sequential)]]
        rows += [["CE (parallel)", "not measured" if speed.parallel is None else _pace(speed, speed.parallel)]]
        rows += [["ME", _pace(speed, speed.mixture)]]
        heads = ["method", "tokens/s"]
        pace = published.SPEED.get(findings.ensembles.get(speed.ensemble) or ())
        if pace is not None and findings.experiment == "table4":
            heads.append("paper, H100")
            rows = [[*row, cell] for row, cell in zip(rows, [""] * len(speed.single) + _printed(pace), strict=True)]
        ratio = f"ME over CE within a repeat, the median: {speed.paired:.2f}×."
        parts += [
            f"### {speed.ensemble}",
            f"On {speed.machine}, weights {_weights(speed.weights)}, k = {speed.top_k}. {ratio}",
            table(heads, rows),
        ]
    return parts


def _speed_curves(findings: Findings) -> str:
    rows = []
    for speed in findings.speeds:
        alone = " / ".join(f"{value:.2f}" for value in speed.single.values())
        rows.append([speed.ensemble, f"{speed.weights[0]:g}", f"{speed.mixture:.2f}", alone])
    return table(("ensemble", "λ", "ME", "members alone"), rows)


def _printed(pace: published.PublishedSpeed) -> list[str]:
    values = (pace.single, pace.sequential, pace.parallel, pace.mixture)
    return [f"{value:.2f} ({ratio:.2f}×)" for value, ratio in zip(values, pace.ratios, strict=True)]


def _pace(speed: SpeedFinding, value: float) -> str:
    return f"{value:.2f} ({speed.ratio(value):.2f}×)"


def _apart(findings: Findings) -> list[str]:
    """Return the paper's rows of ensembles that were not run here."""
    measured = {frozenset(names) for names in findings.ensembles.values() if names is not None}
    lacking = [names for names in published.ENSEMBLES[findings.experiment] if frozenset(names) not in measured]
    if not lacking:
        return []
    head = ["## The paper's own models", f"From {published.SOURCE}; other models than those above."]
    if findings.experiment.startswith("figure"):
        shown = "; ".join(published.title(names) for names in lacking)
        lost = "taken from table 2, since the text has lost the symbols that name them"
        shown = f"{shown} ({lost})" if findings.experiment == "figure4" else shown
        return [*head, f"Models: {shown}; plot only, the text has no numbers."]
    if findings.experiment == "table4":
        rows = [[published.title(names), *_printed(published.SPEED[names])] for names in lacking]
        return [*head, table(("models (H100, tokens/s)", "single", "CE (sequential)", "CE (parallel)", "ME"), rows)]
    alone = dict.fromkeys(name for names in lacking for name in names)
    rows = [[name, *(f"{value:.2f}" for value in published.SINGLE[name])] for name in alone]
    for names in lacking:
        for (method, top_k), cells in published.ACCURACY[names].items():
            label = f"{published.title(names)}: {SHORT[method]} (k = {top_k})"
            rows.append([label, *(f"{cell.value:.2f} ({cell.gain:+.2f})" for cell in cells)])
    return [*head, table(("models", *published.TASKS), rows)]


def _settings(findings: Findings) -> str:
    lines = []
    for label, about in findings.settings["ensembles"].items():
        lines.append(f"- {label}: {', '.join(about['models'])}")
    shown = {key: value for key, value in findings.settings.items() if key not in ("ensembles", "data") and value}
    lines += [
        f"- {key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in shown.items()
    ]
    where = findings.environment
    machine = [str(where[key]) for key in ("accelerator", "processor", "system") if where.get(key)]
    lines.append(f"- machine: {', '.join(machine)}, {where.get('cores', '?')} cores")
    versions = where.get("versions", {})
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return "\n".join(lines)


def _weights(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)
