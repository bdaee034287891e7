"""What it takes to load an engine, with every name already resolved."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A model and how to run it. Members with equal specs share one engine; those with equal
    `weights_key` share weights.

    model: what the user named. dtype: "auto", "float32", "bfloat16" or "float16". device: "auto" or torch's name.
    template: a Jinja chat template in place of the model's own. system: a system message for every conversation.
    adapter: a folder or hub id of a LoRA adapter. engine: a name that the registry knows, or "auto".
    graphs: "auto", "on" or "off": short forward passes of a transformers model in fixed shapes, see `cuda_graphs`.
    candidates: how many top tokens an engine with a `top_k_limit` returns. context, slots: tokens of one sequence and
    sequences kept at once, in llama.cpp and vLLM. tokenizer: folder of the tokenizer of a model behind a server.
    key_env: environment variable with the server's API key. timeout: seconds to wait for a server's response.
    trust_remote_code: whether Python code in the model's folder may run.
    """

    model: str
    name: str
    dtype: str = "auto"
    device: str = "auto"
    template: str | None = None
    system: str | None = None
    adapter: str | None = None
    engine: str = "auto"
    graphs: str = "auto"
    candidates: int = 64
    context: int | None = None
    slots: int = 4
    tokenizer: str | None = None
    key_env: str | None = None
    timeout: float = 120.0
    trust_remote_code: bool = False

    @property
    def weights_key(self) -> EngineSpec:
        """The part of the spec that determines the weights, without adapters."""
        return replace(self, name="", template=None, system=None, adapter=None)
