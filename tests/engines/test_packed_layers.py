"""Reordered weights of a CPU: the same distributions to the last bit, plain weights again for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixlm.engines.transformers import linear_layers
from mixlm.engines.transformers.linear_layers import (
    PackedLinear,
    can_pack,
    pack_linear_layers,
    unpack_linear_layers,
)
from mixlm.engines.transformers.loaded_model import LoadedModel, count_bytes

pytestmark = pytest.mark.skipif(not can_pack(), reason="needs a processor that multiplies bfloat16")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def model(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=120, tie_word_embeddings=tied, attention_bias=True, **sizes)
    made: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype).eval()
    return made


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "_LEAST_WEIGHTS_PACKED", 100)


def packed(llama: LlamaForCausalLM) -> list[str]:
    return [name for name, module in llama.named_modules() if type(module) is PackedLinear]


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_logits_are_those_of_plain_weights_to_the_last_bit(tied: bool) -> None:
    llama = model(tied=tied)
    assert llama.lm_head.weight.dtype == torch.bfloat16
    state = {name: value.clone() for name, value in llama.state_dict().items()}
    expected = [llama(IDS[:, :count]).logits for count in (1, 2, 8)]
    size = count_bytes(llama.parameters())
    copies = pack_linear_layers(llama)
    assert len(packed(llama)) == 2 * 7 + 1
    assert copies == (120 * 64 * 2 if tied else 0)
    assert count_bytes(llama.parameters()) == size
    for count, logits in zip((1, 2, 8), expected, strict=True):
        assert torch.equal(llama(IDS[:, :count]).logits, logits)
    unpack_linear_layers(llama)
    assert packed(llama) == []
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


def test_a_layer_that_a_forward_pass_does_not_call_stays_plain() -> None:
    llama = model()
    llama.model.layers[1].mlp.unused = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    pack_linear_layers(llama)
    assert len(packed(llama)) == 2 * 7 + 1
    assert type(llama.model.layers[1].mlp.unused) is torch.nn.Linear


@pytest.mark.parametrize("change", ["float32", "hooked", "broken"])
def test_other_layers_stay_as_they_are(change: str) -> None:
    llama = model(dtype=torch.float32 if change == "float32" else torch.bfloat16)
    if change == "hooked":
        llama.lm_head.forward = llama.lm_head.forward
    if change == "broken":
        llama.model.layers[0].forward = None
    pack_linear_layers(llama)
    assert len(packed(llama)) == (2 * 7 if change == "hooked" else 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's use of transformers
def test_an_adapter_gets_plain_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model(), lora).save_pretrained(tmp_path)
    loaded = LoadedModel(model(tied=True))
    size = loaded.size
    loaded.pack()
    assert loaded.size == size + 120 * 64 * 2
    loaded.add(str(tmp_path), "tiny")
    assert packed(loaded.model) == []
    assert loaded.size == size
