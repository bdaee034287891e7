"""Models and tokenizers that transformers has loaded become members, on their own tensors, and stay as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_transformers_engine import build
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mixlm
from mixlm.errors import ConfigError, UnsupportedError

PROMPT = "the river"
# Of PEFT, about transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("pair") / "tiny", "llama")


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def text(ensemble: mixlm.Ensemble) -> str:
    return ensemble.generate(PROMPT, seed=3, max_tokens=12, ignore_end=True).text


@pytest.mark.slow
def test_a_pair_writes_what_its_folder_writes(folder, model, tokenizer):
    pair, files = mixlm.load((model, tokenizer), "toy:1"), mixlm.load(folder, "toy:1", dtype="float32")
    assert pair.names == ("tiny", "toy:1")
    assert text(pair) == text(files)
    engines = [ensemble.members[0].engine for ensemble in (pair, files)]
    assert engines[0].vocabulary.end_ids == engines[1].vocabulary.end_ids
    assert engines[0].tokenizer_info == engines[1].tokenizer_info


def test_its_tensors_are_shared_and_it_stays_as_it_is(model, tokenizer):
    model.train()
    before = tokenizer.backend_tokenizer.to_str(), model.config.to_dict()
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    engine = mixlm.load((model, tokenizer)).members[0].engine
    shared = {parameter.data_ptr() for parameter in engine.model.parameters()}
    assert shared == {parameter.data_ptr() for parameter in model.parameters()}
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, logits)
    assert model.training
    assert (tokenizer.backend_tokenizer.to_str(), model.config.to_dict()) == before


def test_a_model_that_is_quantised_says_so(model, tokenizer):
    assert "quantization" not in mixlm.load((model, tokenizer)).members[0].engine.details
    model.config.quantization_config = {"quant_method": "awq"}
    assert mixlm.load((model, tokenizer)).members[0].engine.details["quantization"] == "awq"


def test_options_of_loading_are_of_models_that_are_not_loaded_yet(model, tokenizer):
    with pytest.raises(ConfigError, match="dtype and attn are given, and all models are loaded already"):
        mixlm.load((model, tokenizer), dtype="bfloat16", attn="eager")
    mixlm.load((model, tokenizer), dtype="auto", device="auto", engine="auto", trust_remote_code=False)
    engine = mixlm.load((model, tokenizer), "toy:1", dtype="bfloat16", device="meta").members[0].engine
    assert (engine.details["dtype"], engine.details["device"]) == ("float32", "cpu")


def test_a_compiled_model_runs_behind_its_cache_as_others_do(model, tokenizer):
    compiled = SimpleNamespace(_orig_mod=model)  # as `torch.compile` returns, which takes seconds to import
    assert "not batched" not in mixlm.load((compiled, tokenizer)).members[0].engine.details


def test_one_pair_twice_shares_one_engine(model, tokenizer):
    first, second = mixlm.load((model, tokenizer), (model, tokenizer)).members
    assert first.engine is second.engine
    assert (first.name, second.name) == ("tiny", "tiny-2")


def test_a_peft_model_writes_with_its_active_adapter(model, tokenizer):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    engine = mixlm.load((adapted, tokenizer)).members[0].engine
    ids = np.array([5, 6, 7, 8])
    with torch.inference_mode():
        expected = adapted(torch.tensor(ids[None])).logits[0, -1].numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor(ids[None])).logits[0, -1].numpy()
    np.testing.assert_allclose(engine.session().logits(ids)[0], expected, atol=1e-4)
    assert abs(plain - expected).max() > 0.01


def test_an_adapter_that_looks_for_its_beginning_is_refused(model, tokenizer):
    peft = pytest.importorskip("peft")
    begin = {"alora_invocation_tokens": [30, 31]}
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM", **begin)
    with pytest.raises(UnsupportedError, match=r"does more than its layers do, .* where it begins \(LoraConfig\)"):
        mixlm.load((peft.get_peft_model(model, config), tokenizer))


def test_what_is_no_model_is_refused(model, tokenizer, folder):
    peft = pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"Linear is no causal language model .*\(model, tokenizer\)"):
        mixlm.load((torch.nn.Linear(2, 2), tokenizer))
    with pytest.raises(ConfigError, match="LlamaModel is no causal language model"):
        mixlm.load((AutoModel.from_pretrained(folder), tokenizer))
    with pytest.raises(ConfigError, match=r"is a LlamaForCausalLM; it must be a name or a path .*\(model, tokenizer\)"):
        mixlm.load(model)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedError, match=r"puts tokens of its own in front of the text \(PromptTuningConfig\)"):
        mixlm.load((tuned, tokenizer))
