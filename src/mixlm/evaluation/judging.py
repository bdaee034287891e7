"""Between the harness's tasks and scores: requests for a task, and what the task makes of the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixlm.evaluation.catalog import quiet
from mixlm.evaluation.contexts import pack
from mixlm.evaluation.results import Score

# The value of each question, by metric and filter.
Table = dict[tuple[str, str], list[Any]]
_FEWSHOT_SEED = 1234


def build_requests(task: Any, limit: int | None, chat: bool | None) -> list[Any]:
    """Return a task's requests in order, each as often as the task repeats it."""
    if chat is None:
        chat = task.OUTPUT_TYPE == "generate_until"

    def template(history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return pack(history)

    # Which examples a prompt shows is fixed, whatever the seed of the completions.
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with quiet():
        task.build_all_requests(
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=template if chat else None,
            tokenizer_name="mixlm",
        )
    return [instance for instance in task.instances for _ in range(instance.repeats or 1)]


def judge(task: Any, requests: Sequence[Any], responses: Sequence[Any]) -> Table:
    """Return what the task makes of responses: the value of each question, by metric and filter."""
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
    for request, response in zip(requests, responses, strict=True):
        request.resps.append(response)
    with quiet():
        task.apply_filters()
    questions = defaultdict(list)
    for instance in task.instances:
        questions[instance.doc_id].append(instance)
    out: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for name in task.instances[0].filtered_resps:
        for parts in questions.values():
            parts.sort(key=lambda part: part.idx)
            metrics = task.process_results(parts[0].doc, [part.filtered_resps[name] for part in parts])
            for metric, value in metrics.items():
                out[metric, name].append(value)
    return out


def to_scores(name: str, method: str, task: Any, seeds: Sequence[int], tables: Sequence[Table]) -> list[Score]:
    """Return a score for each metric and filter. tables: what `judge` returned, one a seed."""
    scores = []
    for metric, chosen in tables[0]:
        columns = [table[metric, chosen] for table in tables]
        aggregate = task.aggregation().get(metric, np.mean)
        try:
            values = tuple(float(aggregate(column)) for column in columns)
        except (TypeError, ValueError):
            continue  # not a number, such as the harness's "bypass"
        questions = None
        if all(isinstance(value, int | float | np.number) for column in columns for value in column):
            questions = np.array(columns, dtype=np.float64)
            if not np.allclose(questions.mean(axis=1), values):
                questions = None  # the metric is another function of the questions than their mean
        higher = bool(task.higher_is_better().get(metric, True))
        scores.append(Score(name, method, metric, chosen, higher, tuple(seeds), values, len(columns[0]), questions))
    return scores
