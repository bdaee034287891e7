"""What it takes to load an engine, resolved: no name look-ups left to do."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A model and how to run it. Members with equal specs share one engine, with equal `weights` one copy of those.

    model: what the user named. dtype: "auto", "float32", "bfloat16" or "float16". device: "auto" or torch's name.
    template: a Jinja chat template in place of the model's own. system: a text in front of every conversation.
    adapter: a folder or hub id of a LoRA adapter. engine: "auto", "hf", "llamacpp", "vllm" or "remote".
    graphs: "auto", "on" or "off": forwards of a transformers model in fixed shapes, see `cuda_graphs`.
    candidates: how many of its likeliest tokens a member that cannot tell all of them tells. context, slots: tokens of
    one sequence, and sequences kept at once, in llama.cpp and vLLM. tokenizer: where the tokenizer of a model behind a
    server lies. key_env: the environment variable that holds the server's key. timeout: seconds to wait for its answer.
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

    @property
    def weights_key(self) -> EngineSpec:
        """What of this decides which weights have to be loaded, adapters aside."""
        return replace(self, name="", template=None, system=None, adapter=None)
