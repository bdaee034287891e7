"""A server that answers as SGLang does, over a table.

Fields, refusals and statuses are as in SGLang's source, version 0.5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from servers import FakeServer

from mixlm.engines.toy import random_table

_PARAMETERS = {
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex",
    "ebnf", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "logit_bias",
    "sampling_seed", "custom_params",
}  # fmt: skip
_LOWEST = float(np.finfo(np.float32).min)


class FakeSGLang(FakeServer):
    """info: what `/server_info` returns. preferred: the server's own sampling defaults. scale: of the logits.

    caches: whether it has a prefix cache. tokenize: what `/tokenize` does, None where there is none. adapters: the
    seeds of LoRA adapters, by name.
    """

    completion_path = "/generate"

    def __init__(self, size: int = 260, seed: int = 0, *, key: str | None = None, context: int = 512) -> None:
        super().__init__(size, seed, key=key)
        self.context = context
        self.models = [
            {
                "id": "fake",
                "object": "model",
                "created": 1,
                "owned_by": "sglang",
                "root": "fake",
                "parent": None,
                "max_model_len": context,
            }
        ]
        self.info: dict[str, Any] = {
            "model_path": "nowhere/fake",
            "tokenizer_path": "nowhere/fake",
            "served_model_name": "fake",
            "max_total_num_tokens": 10_000,
            "max_req_input_len": context - 6,
            "page_size": 1,
            "version": "0.5.23",
        }
        self.pages = {"/server_info": self.info}
        self.preferred: dict[str, Any] = {}
        self.adapters: dict[str, int] = {}
        self.caches = True
        self.tokenize: Callable[[str], list[int]] | None = None
        self.scale = 1.5
        self._prefixes: list[list[int]] = []

    def logits(self, ids: Sequence[int], adapter: str | None = None) -> np.ndarray:
        seed = self.seed if adapter is None else self.adapters[adapter]
        return random_table(self.size, seed, order=10_000, scale=self.scale)(tuple(ids)).astype(np.float32)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize" and self.tokenize is not None and "prompt" in body:
            ids = self.tokenize(body["prompt"])
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.context}
        if path == "/v1/completions":
            x = self.logits(body["prompt"])
            top = {f"text {i}": float(x[i]) for i in np.argsort(-x)[: body.get("logprobs") or 0]}
            return 200, {"model": body["model"], "choices": [{"text": "x", "logprobs": {"top_logprobs": [top]}}]}
        return 404, {"detail": "Not Found"}

    def refusal(self, body: dict[str, Any]) -> Any:
        ids, sampling = body.get("input_ids"), body.get("sampling_params", {})
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            message = "1 validation error: {'loc': ('body', 'input_ids')}"
            return {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}
        unknown = next(iter({*sampling} - _PARAMETERS), None)
        if unknown is not None:
            return {"error": f"unknown field `{unknown}`, expected one of `max_new_tokens`, `stop`"}
        sampling = {**self.preferred, **sampling}
        n, adapter = len(ids), body.get("lora_path")
        longest = self.info.get("max_req_input_len", self.context - 6)
        context = f"The input ({n} tokens) is longer than the model's context length ({self.context} tokens)."
        errors = (
            (n >= self.context, context),
            (n >= longest, f"Input length ({n} tokens) exceeds the maximum allowed length ({longest} tokens)."),
            (sampling.get("min_new_tokens", 0) > 1, "min_new_tokens must be in [0, max_new_tokens(1)]"),
            (adapter not in (None, *self.adapters), f"requested LoRA adapters are not loaded: {adapter}"),
        )
        message = next((text for is_wrong, text in errors if is_wrong), None)
        return None if message is None else {"error": {"message": message}}

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, count = body["input_ids"], body.get("top_logprobs_num") or 0
        if count > self.size:
            self.stop()  # what asks for more rows than there are ends the process that runs the model
        sampling = {**self.preferred, **body.get("sampling_params", {})}
        shared = max([_common(prefix, ids) for prefix in self._prefixes], default=0)
        cached = min(shared, len(ids) - 1) if self.caches else 0
        self._prefixes.append(list(ids))
        x = self.logits(ids, body.get("lora_path"))
        for token, bias in (sampling.get("logit_bias") or {}).items():
            x[int(token)] += bias
        x = x / np.float32(sampling.get("temperature", 1.0))
        shifted = np.exp(x - x.max())
        with np.errstate(divide="ignore"):
            logprobs = np.maximum(np.log(shifted / shifted.sum()), np.float32(_LOWEST))
        sampled = int(np.random.default_rng().choice(self.size, p=shifted.astype(float) / shifted.astype(float).sum()))
        end = not sampling.get("ignore_eos") and sampled == 256
        meta = {
            "id": "1",
            "finish_reason": {"type": "stop", "matched": sampled} if end else {"type": "length", "length": 1},
            "prompt_tokens": len(ids),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": 1,
            "cached_tokens": cached,
        }
        if body.get("return_logprob"):
            meta["input_token_logprobs"] = []
            if body.get("logprob_start_len") == 0:
                scored = []
                for end in range(1, len(ids)):
                    row = self.logits(ids[:end]).astype(float)
                    scored.append(row - np.log(np.exp(row - row.max()).sum()) - row.max())
                own = [[float(row[token]), token, None] for row, token in zip(scored, ids[1:], strict=True)]
                meta["input_token_logprobs"] = [[None, ids[0], None], *own]
            meta["output_token_logprobs"] = [[float(logprobs[sampled]), sampled, None]]
            meta["output_token_logprobs_length"] = 1
            if body.get("token_ids_logprob"):
                listed = [[float(logprobs[i]), i, None] for i in body["token_ids_logprob"]]
                meta["output_token_ids_logprobs"] = [listed]
            if count:
                top = np.argsort(-logprobs)[:count]
                meta["input_top_logprobs"] = []
                if body.get("logprob_start_len") == 0:
                    tops = [[[float(row.max()), int(row.argmax()), None]] for row in scored]
                    meta["input_top_logprobs"] = [None, *tops]
                meta["output_top_logprobs"] = [[[float(logprobs[i]), int(i), None] for i in top]]
        return {"text": "" if end else "x", "output_ids": [sampled], "meta_info": meta}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)
