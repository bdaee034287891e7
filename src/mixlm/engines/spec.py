"""What it takes to load an engine, resolved: no name look-ups left to do."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A model and how to run it. Members with equal specs share one engine, with equal `weights` one copy of those.

    model: what the user named. dtype: "auto", "float32", "bfloat16" or "float16". device: "auto" or torch's name.
    template: a Jinja chat template in place of the model's own. system: a text in front of every conversation.
    adapter: a folder or hub id of a LoRA adapter.
    """

    model: str
    name: str
    dtype: str = "auto"
    device: str = "auto"
    template: str | None = None
    system: str | None = None
    adapter: str | None = None

    @property
    def weights(self) -> EngineSpec:
        """What of this decides which weights have to be loaded, adapters aside."""
        return replace(self, name="", template=None, system=None, adapter=None)
