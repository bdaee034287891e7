"""Rotary position frequencies that depend on how long a sequence is: longrope, and dynamic NTK scaling.

transformers takes the frequencies of all positions of a forward pass from the longest position in it: those of Phi-3's
longrope (Ding et al., 2024, arXiv 2402.13753) change beyond the length of pretraining, those of dynamic NTK with every
token beyond it. Keys in a KV cache, the parts of a prompt, and other sequences of a batch would get others than a
forward pass of the whole text gives. So a length has a regime; a cache is of one regime, and so is a forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from contextlib import suppress
from functools import partial
from typing import Any

import torch


class PositionFrequencies:
    """Rotary embeddings whose frequencies depend on the length of a sequence. length: in the next forward pass."""

    def __init__(self, modules: list[Any]) -> None:
        self.length = 1
        self._rules = sorted({rule for module in modules for rule in _rules(module)})
        for module in modules:
            module.forward = partial(self._forward, module)

    @classmethod
    def of(cls, model: Any) -> PositionFrequencies | None:
        """Return those of a model; None where they are the same for all lengths."""
        modules = [module for module in model.modules() if _rules(module)]
        return cls(modules) if modules else None

    def regime(self, length: int) -> Hashable:
        """Return what is equal for two lengths whose frequencies are equal."""
        return tuple((length > limit) * (length if changes else 1) for limit, changes in self._rules)

    def _forward(self, module: Any, x: Any, position_ids: Any, *args: Any, **options: Any) -> Any:
        decorated = type(module).forward
        # Dynamic frequencies forget a longer sequence only when a short one comes.
        for longest in (0, self.length - 1):
            decorated(module, x, torch.full_like(position_ids[..., :1], longest), *args, **options)
        return inspect.unwrap(decorated)(module, x, position_ids, *args, **options)


def unknown_frequencies(model: Any, longest: int) -> str | None:
    """Return the class of rotary embeddings that a later position changes in a way that is not known here, or None.

    longest: how many positions the model has.
    """
    for module in model.modules():
        if "rotary" not in type(module).__name__.lower() or _rules(module):
            continue
        with suppress(Exception):  # it is called otherwise; the trial of a model tells of short texts
            x = torch.zeros(1, device=model.device)
            alone, beside = (
                [part[0, 1] for part in module(x, torch.tensor([positions], device=model.device))]
                for positions in ([0, 1], [0, 1, longest - 1])
            )
            if not all(torch.allclose(*pair, atol=1e-4) for pair in zip(alone, beside, strict=True)):
                return type(module).__name__
    return None


def _rules(module: Any) -> list[tuple[int, bool]]:
    """Return the lengths beyond which a module's frequencies are others, and whether they change with every token."""
    kinds = getattr(module, "rope_type", None)
    rules = []
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        if not isinstance(kind, str):
            continue
        if kind == "longrope":
            options = module.config.rope_parameters
            options = options if layer is None else options[layer]
            rules.append((int(options["original_max_position_embeddings"]), False))
        elif "dynamic" in kind:
            rules.append((int(module.original_max_seq_len), True))
    return rules
