"""The processor of banned ids under both of vLLM's interfaces, with stand-ins for vLLM's own modules."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mixlm.engines.vllm.sampling_params import BANNED_ARGUMENT

torch = pytest.importorskip("torch")
PLUGIN = "mixlm.engines.vllm.banned_tokens_plugin"


class ByRow(ABC):
    @abstractmethod
    def update_state(self, batch_update): ...

    @abstractmethod
    def is_argmax_invariant(self): ...

    @abstractmethod
    def apply(self, logits): ...


class BySlot(ABC):
    @abstractmethod
    def apply(self, logits, ctx): ...


def update_rows(rows, update, read):
    """What vLLM's helper does with a list of (row, params): None ends a row. Returns whether anything changed."""
    for row, params in update or ():
        ranges = None if params is None else read(params, [], [])
        rows.pop(row, None)
        if ranges:
            rows[row] = ranges
    return bool(update)


@pytest.fixture
def plugin(monkeypatch):
    """Imports the plugin as a vLLM that has these interfaces would."""

    def load(*interfaces: str) -> ModuleType:
        names = ["vllm", "vllm.config", "vllm.v1", "vllm.v1.sample", "vllm.v1.worker", "vllm.v1.worker.gpu"]
        modules = {name: ModuleType(name) for name in [*names, "vllm.v1.worker.gpu.sample"]}
        modules["vllm"].SamplingParams = SimpleNamespace
        absent = dict.fromkeys(
            ["vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor.interface"]
        )
        if "rows" in interfaces:
            processors = modules["vllm.v1.sample.logits_processor"] = ModuleType("processors")
            builtin = modules["vllm.v1.sample.logits_processor.builtin"] = ModuleType("builtin")
            processors.LogitsProcessor, builtin.process_dict_updates = ByRow, update_rows
        if "slots" in interfaces:
            modules["vllm.v1.worker.gpu.sample.logits_processor"] = ModuleType("processors")
            interface = modules["vllm.v1.worker.gpu.sample.logits_processor.interface"] = ModuleType("interface")
            interface.LogitsProcessor = BySlot
        for name, module in {**absent, **modules}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
        module = importlib.import_module(PLUGIN)
        monkeypatch.delitem(sys.modules, PLUGIN)
        return module

    return load


def params(ranges: str | None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=None if ranges is None else {BANNED_ARGUMENT: ranges})


def banned(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isneginf(row)).tolist() for row in logits.numpy()]


@pytest.mark.parametrize("interfaces", [("rows",), ("rows", "slots")], ids=str)
def test_rows_of_the_first_runner(plugin, interfaces):
    processor = plugin(*interfaces).BannedTokensProcessor(None, torch.device("cpu"), False)
    assert isinstance(processor, ByRow)
    assert not processor.is_argmax_invariant()
    processor.update_state([(0, params("1-2")), (1, params(None)), (2, params("1-2")), (3, params("0,4"))])
    assert banned(processor.apply(torch.zeros(4, 6))) == [[1, 2], [], [1, 2], [0, 4]]
    processor.update_state(None)
    assert banned(processor.apply(torch.zeros(4, 6))) == [[1, 2], [], [1, 2], [0, 4]]
    processor.update_state([(0, None), (2, None)])
    assert banned(processor.apply(torch.zeros(4, 6))) == [[], [], [], [0, 4]]


@pytest.mark.parametrize("interfaces", [("slots",), ("rows", "slots")], ids=str)
def test_slots_of_the_second_runner(plugin, interfaces):
    state = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=8, vocab_size=6)
    processor = plugin(*interfaces).BannedTokensProcessor(None, state)
    assert isinstance(processor, BySlot)
    assert processor.add_request(5, params("1-2"))
    assert not processor.add_request(2, params(None))
    assert processor.add_request(7, params("0,4"))

    def apply(slots: list[int], rows: list[int]) -> list[list[int]]:
        context = SimpleNamespace(idx_mapping_np=np.array(slots), expanded_idx_mapping=torch.tensor(rows))
        return banned(processor.apply(torch.zeros(len(rows), 6), context))

    assert apply([7, 2, 5], [7, 2, 5]) == [[0, 4], [], [1, 2]]
    assert apply([5, 2], [5, 5, 5, 2]) == [[1, 2], [1, 2], [1, 2], []]  # drafts: several rows of a request
    assert apply([2], [2]) == [[]]
    assert not processor.add_request(5, params(None))  # the slot has another request
    assert processor.add_request(2, params("3"))
    assert apply([5, 2], [5, 2]) == [[], [3]]


def test_ranges_are_checked_when_a_request_comes(plugin):
    processor = plugin("rows", "slots").BannedTokensProcessor
    processor.validate_params(params("0-3,9"))
    processor.validate_params(params(None))
    with pytest.raises(ValueError, match=r".+"):
        processor.validate_params(params("a-b"))
