"""Small tasks in the harness's form, and toy ensembles that can answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixlm.binding import LoadedMember
from mixlm.engines.toy import WORD_TOKENS, ToyEngine, random_table
from mixlm.ensemble import Ensemble

OTHER_TOKENS = (*(bytes([b]) for b in range(256)), b"th", b"he", b"the", b" o", b" and", b"er")
WORDS = {
    "generate": (
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\noutput_type: generate_until\n"
        "generation_kwargs: {until: ['e'], do_sample: true, temperature: 1.0, max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    ),
    "greedy": (
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\noutput_type: generate_until\n"
        "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    ),
    "choice": (
        "doc_to_text: '{{question}}'\ndoc_to_choice: [' river', ' stone', ' the cloud']\ndoc_to_target: index\n"
        "output_type: multiple_choice\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    ),
    "rolling": (
        "doc_to_text: ''\ndoc_to_target: '{{question}}'\noutput_type: loglikelihood_rolling\n"
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n"
    ),
}
QUESTIONS = ("where does the river turn", "what is under the stone", "who sings", "what falls", "which bird")


def toys(*, piece: bool = False, weights: Sequence[float] = (0.7, 0.3), **options: Any) -> Ensemble:
    vocabularies = (WORD_TOKENS, OTHER_TOKENS if piece else WORD_TOKENS)
    members = [
        LoadedMember(ToyEngine(tokens, random_table(len(tokens) + 2, 20 + i, scale=3), name=f"toy{i}"), f"toy{i}")
        for i, tokens in enumerate(vocabularies)
    ]
    return Ensemble(members, weights, **options)
