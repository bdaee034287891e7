"""Linear layers of a CPU: the order of the product changes no result, and only layers that gain have it."""

from __future__ import annotations

import pytest
import torch

from mixlm.engines.transformers import few_rows
from mixlm.engines.transformers.few_rows import FewRowsLinear, speed_up_linear_layers


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> torch.nn.ModuleDict:
    monkeypatch.setattr(few_rows, "transposed_is_faster", lambda: True)
    monkeypatch.setattr(few_rows, "_LEAST_WEIGHTS", 100)
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "large": torch.nn.Linear(12, 10),
            "without_bias": torch.nn.Linear(12, 10, bias=False),
            "small": torch.nn.Linear(3, 4),
            "narrow": torch.nn.Linear(12, 10, dtype=torch.bfloat16),
            "hooked": torch.nn.Linear(12, 10),
        }
    )


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 2, 12), (2, 3, 12), (64, 12), (65, 12), (5, 13, 12), (0, 12)])
@torch.inference_mode()
def test_the_product_is_the_same(
    layers: torch.nn.ModuleDict, shape: tuple[int, ...], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn:
        monkeypatch.setattr(few_rows, "_LEAST_WEIGHTS_ONEDNN", 100)
    x = torch.randn(shape)
    for name in ("large", "without_bias"):
        expected = layers[name](x)
        speed_up_linear_layers(layers)
        assert type(layers[name]) is FewRowsLinear
        actual = layers[name](x)
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        assert torch.allclose(actual, expected, atol=1e-6)


def test_gradients_are_those_of_a_plain_layer(layers: torch.nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_LEAST_WEIGHTS_ONEDNN", 100)
    x = torch.randn(1, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(layers["large"](x).sum(), x)
    speed_up_linear_layers(layers)
    (actual,) = torch.autograd.grad(layers["large"](x).sum(), x)
    assert torch.allclose(actual, expected)


def test_other_layers_stay_as_they_are(layers: torch.nn.ModuleDict) -> None:
    layers["hooked"].forward = lambda x: x
    quantised = layers["large"].weight.detach().as_subclass(type("Quantised", (torch.Tensor,), {}))
    layers["quantised"] = torch.nn.Linear(12, 10)
    layers["quantised"].weight = torch.nn.Parameter(quantised)
    speed_up_linear_layers(layers)
    assert {name for name, layer in layers.items() if type(layer) is FewRowsLinear} == {"large", "without_bias"}


def test_no_layer_is_changed_where_nothing_is_gained(
    layers: torch.nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "transposed_is_faster", lambda: False)
    speed_up_linear_layers(layers)
    assert not any(type(layer) is FewRowsLinear for layer in layers.values())
