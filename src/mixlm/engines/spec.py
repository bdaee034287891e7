"""What it takes to load an engine, with every name already resolved."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Of transformers alone.
LOADING_OPTIONS = ("device_map", "max_memory", "quantization", "revision", "attn")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A model and how to run it. Members of equal specs share one engine; those of equal `weights_key` share weights.

    model: what the user named. dtype: "auto", "float32", "bfloat16" or "float16". device: "auto" or torch's name.
    template: a Jinja chat template in place of the model's own. system: a system message for every conversation.
    adapter: a folder or hub id of a LoRA adapter. engine: a name that the registry knows, or "auto".
    graphs: "auto", "on" or "off": short forward passes of a transformers model in fixed shapes, see `cuda_graphs`.
    prefix_cache: MiB of KV caches that a transformers model keeps for sequences with the same beginning, 0 for none.
    candidates: how many top tokens an engine with a `top_k_limit` returns. context, slots: tokens of one sequence and
    sequences kept at once, in llama.cpp and vLLM. tokenizer: folder of the tokenizer of a model behind a server.
    key_env: environment variable with the server's API key. timeout: seconds to wait for a server's response.
    trust_remote_code: whether Python code in the model's folder may run.

    Of a transformers model: device_map: accelerate's, "auto" and the like, or pairs of a module and its device.
    max_memory: pairs of a device and a size such as "20GiB", for "auto". quantization: one of `choices.QUANTIZATIONS`.
    revision: branch, tag or commit of a hub id. attn: transformers' attention implementation.
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
    prefix_cache: int = 1024
    candidates: int = 64
    context: int | None = None
    slots: int = 4
    tokenizer: str | None = None
    key_env: str | None = None
    timeout: float = 120.0
    trust_remote_code: bool = False
    device_map: str | tuple[tuple[str, str | int], ...] | None = None
    max_memory: tuple[tuple[str, str], ...] | None = None
    quantization: str | None = None
    revision: str | None = None
    attn: str | None = None

    @property
    def loading_options(self) -> list[str]:
        """The options that are set and that transformers alone takes."""
        return [name for name in LOADING_OPTIONS if getattr(self, name) is not None]

    @property
    def weights_key(self) -> EngineSpec:
        """The part of the spec that determines the weights, without adapters."""
        return replace(self, name="", template=None, system=None, adapter=None)
