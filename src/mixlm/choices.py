"""The names that options may have as values. It imports nothing heavy, for `mixlm COMMAND --help`."""

from __future__ import annotations

from typing import Literal

Method = Literal["mixture", "conventional", "greedy", "single", "speculative", "auto"]
UnitName = Literal["auto", "token", "piece", "word", "byte"]
EngineName = Literal["auto", "hf", "llamacpp", "vllm", "remote"]
OnFailure = Literal["error", "drop"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Graphs = Literal["auto", "on", "off"]
Rule = Literal["gac", "unite"]
LogprobsOf = Literal["member", "ensemble"]
RouterKind = Literal["fixed", "prompt", "learned"]
METHODS: tuple[Method, ...] = ("mixture", "conventional", "greedy", "single", "speculative", "auto")
UNITS: tuple[UnitName, ...] = ("auto", "token", "piece", "word", "byte")
RULES: tuple[Rule, ...] = ("gac", "unite")
ENGINES: tuple[EngineName, ...] = ("auto", "hf", "llamacpp", "vllm", "remote")
LOGPROBS_OF: tuple[LogprobsOf, ...] = ("member", "ensemble")
ON_FAILURE: tuple[OnFailure, ...] = ("error", "drop")
GRAPHS: tuple[Graphs, ...] = ("auto", "on", "off")
DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16", "float16")
