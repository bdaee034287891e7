"""Linear layers on a CPU, for the few tokens of a decode step, a catch-up, a verification or a batch.

float32: `x Wᵀ` of up to 64 rows x should cost little more than of one: reading W is what takes the time. But MKL
multiplies one row in a single thread, and on processors of some kinds it rearranges all of W for two. `W xᵀ` is the
same product, in which it is the few rows that are rearranged; and oneDNN has faster instructions for it than MKL uses
there.

bfloat16: PyTorch hands oneDNN weights as they lie, and oneDNN reorders them in every forward pass. For few rows that
takes as long as the product itself. Here they are reordered once, when the model is loaded. The products are the same
to the last bit.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

_MOST_ROWS = 64
_LEAST_WEIGHTS = 1 << 19  # with fewer, both take no time
_LEAST_WEIGHTS_ONEDNN = 1 << 22  # with fewer, calling it takes as long as it saves
_LEAST_WEIGHTS_PACKED = 1 << 20  # the same, of bfloat16


class FewRowsLinear(torch.nn.Linear):
    """A linear layer that multiplies in the way that suits few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x Wᵀ + b`: (…, inputs) to (…, outputs)."""
        rows = x.numel() // self.in_features
        if rows and self.weight.numel() >= _LEAST_WEIGHTS_ONEDNN and not torch.is_grad_enabled():
            multiply = torch.ops.mkldnn._linear_pointwise
            if rows > _MOST_ROWS:
                product: torch.Tensor = multiply(x.reshape(rows, -1), self.weight, self.bias, "none", [], "")
                return product.view(*x.shape[:-1], self.out_features)
            product = multiply(self.weight, x.reshape(rows, -1), None, "none", [], "").T.contiguous()
        elif 2 <= rows <= _MOST_ROWS:
            product = torch.mm(self.weight, x.reshape(rows, -1).T).T.contiguous()
        else:
            return super().forward(x)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def speed_up_linear_layers(model: Any) -> None:
    """Let the large float32 layers of a model on a CPU multiply in the faster way."""
    layers = [module for module in model.modules() if _is_plain(module, torch.float32, _LEAST_WEIGHTS)]
    if layers and transposed_is_faster():
        for layer in layers:
            layer.__class__ = FewRowsLinear  # not another module: adapters and tied weights refer to this one


def _is_plain(module: Any, dtype: torch.dtype, least_weights: int) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):  # accelerate's hooks replace it
        return False
    weight = module.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == dtype and weight.is_contiguous()
    return is_plain and weight.numel() >= least_weights


def transposed_is_faster() -> bool:
    """Whether few float32 rows are multiplied faster in this way: with MKL on processors without AVX-512.

    Measured with two threads on an AVX2 processor, milliseconds of 1, 2, 4, 8, 16 and 64 rows by 8960 x 1536 weights:
    6, 12, 23, 24, 24 and 36 by `linear`; 6, 6, 7, 12, 14 and 27 by `mm`; 4, 6, 6, 6, 6 and 18 by oneDNN. It is no
    trial, since rounding differs: equal seeds shall give equal texts, however busy a machine was when it loaded the
    model.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return has_mkl and has_onednn and bool(torch.backends.cpu.get_cpu_capability() == "AVX2")


class PackedLinear(torch.nn.Linear):
    """A linear layer with reordered weights: its own, or a copy where another module has the same ones."""

    reordered_copy: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x Wᵀ + b`: (…, inputs) to (…, outputs)."""
        weight = self.weight if self.reordered_copy is None else self.reordered_copy
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return product


def pack_linear_layers(model: Any) -> int:
    """Reorder the weights of a model's large bfloat16 layers on a CPU, where oneDNN multiplies bfloat16.

    Only layers that a forward pass calls: some models use the weights of others directly. A layer that has its weights
    in common with another module, as an output layer that is tied to the embeddings, gets a copy of them.

    Returns:
        Bytes of the copies.
    """
    if not can_pack():
        return 0
    layers = [module for module in model.modules() if _is_plain(module, torch.bfloat16, _LEAST_WEIGHTS_PACKED)]
    if not layers:
        return 0
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    copies = 0
    for layer in _called(model, layers):
        weight = layer.weight
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        layer.__class__ = PackedLinear  # not another module: hooks refer to this one
        if owners[id(weight)] > 1:
            layer.reordered_copy = reordered
            copies += weight.numel() * weight.element_size()
        else:
            layer.weight = torch.nn.Parameter(reordered, requires_grad=False)
    return copies


def unpack_linear_layers(model: Any) -> None:
    """Give the layers that `pack_linear_layers` has changed their plain weights back."""
    packed: list[Any] = [module for module in model.modules() if type(module) is PackedLinear]
    for layer in packed:
        if layer.reordered_copy is None:
            layer.weight = torch.nn.Parameter(layer.weight.to_dense(), requires_grad=False)
        layer.reordered_copy = None
        layer.__class__ = torch.nn.Linear


def can_pack() -> bool:
    """Whether the processor multiplies bfloat16, and PyTorch can reorder weights for it."""
    onednn = torch.ops.mkldnn
    has_ops = hasattr(onednn, "_linear_pointwise") and hasattr(onednn, "_reorder_linear_weight")
    return bool(torch.backends.mkldnn.is_available() and has_ops and onednn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def _called(model: Any, layers: list[torch.nn.Linear]) -> list[torch.nn.Linear]:
    """Return the layers that a forward pass of one token calls; none where the model cannot run it."""
    called: set[int] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(id(layer))) for layer in layers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.ones((1, 1), dtype=torch.int64))
    except Exception:  # what is wrong with the model, the trial at load says
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for layer in layers if id(layer) in called]
