"""The names that options may have as values. It imports nothing heavy, for `mixlm COMMAND --help`.

An engine's name is open: `mixlm.engines.registry` knows those that are there.
"""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["mixture", "conventional", "greedy", "single", "speculative", "auto", "layered"]
UnitName = Literal["auto", "token", "piece", "word", "byte"]
OnFailure = Literal["error", "drop"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Graphs = Literal["auto", "on", "off"]
Quantization = Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"]
Rule = Literal[
    "average",
    "geometric",
    "power",
    "max",
    "min",
    "contrastive",
    "proxy",
    "guidance",
    "mean-then-truncate",
    "mean-then-temper",
    "union-top-k",
    "gac",
    "vote",
    "defer",
    "unite",
]
ContrastiveForm = Literal["weighted", "original"]
DeferBy = Literal["top", "entropy", "token"]
LogprobsOf = Literal["member", "ensemble"]
RouterKind = Literal["fixed", "prompt", "learned"]
METHODS: tuple[Method, ...] = get_args(Method)
UNITS: tuple[UnitName, ...] = get_args(UnitName)
RULES: tuple[Rule, ...] = get_args(Rule)
RULES_WITH_ROLES = ("contrastive", "proxy", "guidance")
CONTRASTIVE_FORMS: tuple[ContrastiveForm, ...] = get_args(ContrastiveForm)
DEFER_BY: tuple[DeferBy, ...] = get_args(DeferBy)
LOGPROBS_OF: tuple[LogprobsOf, ...] = get_args(LogprobsOf)
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)
GRAPHS: tuple[Graphs, ...] = get_args(Graphs)
DTYPES: tuple[DType, ...] = get_args(DType)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
