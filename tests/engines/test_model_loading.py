"""What a folder lacks, holds too much of, or would run is an error that names it, or a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_transformers_engine import build, load
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

from mixlm.engines import EngineSpec
from mixlm.engines.contract import random_ids, uncached
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.model_loading import context_length, vocabulary_size
from mixlm.errors import ModelLoadError, UnsupportedError
from mixlm.inspection.unloaded import load_described

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
(pathlib.Path({folder!r}) / "ran").touch()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def rewrite(folder: Path, change: Callable[[dict], dict] = dict, **config: object) -> Path:
    """Change a model's weights and its configuration."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return build(tmp_path / "m", "llama")


def without(part: str) -> Callable[[dict], dict]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("lm_head.weight", r"lack 1 weight \(lm_head.weight\)"),
        ("layers.1.", r"lack 9 weights \(model.layers.1.input_layernorm.weight, .*, …\)"),
        ("layers.0.mlp.up_proj", r"lack 1 weight \(model.layers.0.mlp.up_proj.weight\)"),
        ("model.norm.weight", r"lack 1 weight \(model.norm.weight\)"),
    ],
)
def test_weights_that_are_missing_are_named(folder, part, named):
    with pytest.raises(ModelLoadError, match=f"the files of tiny {named}"):
        load(rewrite(folder, without(part)))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_weights_under_a_prefix_are_named_with_it(folder, prefix):
    prefixed = rewrite(folder, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    with pytest.raises(
        ModelLoadError, match=rf"lack 21 weights \(lm_head.weight, .*they hold 21 weights \({prefix}lm_"
    ):
        load(prefixed)


def test_a_tied_output_layer_need_not_be_there(folder):
    engine = load(rewrite(folder, without("lm_head.weight"), tie_word_embeddings=True))
    ids = random_ids(engine, 5)
    np.testing.assert_array_equal(uncached(engine, ids), uncached(load(folder), ids))
    assert engine.notes == ()


def test_embeddings_that_are_missing_on_both_sides_are_named(folder):
    with pytest.raises(ModelLoadError, match=r"lack .*embed_tokens.weight"):
        load(rewrite(rewrite(folder, without("lm_head.weight")), without("embed_tokens"), tie_word_embeddings=True))


def test_weights_of_other_sizes_are_named(folder):
    with pytest.raises(ModelLoadError, match=r"mlp.down_proj.weight: \(32, 48\) instead of \(32, 64\)"):
        load(rewrite(folder, intermediate_size=64))


def test_weights_that_have_no_place_are_a_note(folder):
    [note] = load(rewrite(folder, num_hidden_layers=1)).notes
    assert "hold 9 weights (model.layers.1.input_layernorm.weight, " in note


def test_scales_that_no_configuration_explains_are_an_error(folder):
    part = "model.layers.0.mlp.up_proj.weight"
    scaled = rewrite(folder, lambda weights: {**weights, part + "_scale_inv": torch.ones(1)})
    with pytest.raises(
        ModelLoadError, match=r"are quantised, and its config.json does not say how.*up_proj.weight_sca"
    ):
        load(scaled)


def test_weights_that_are_no_numbers_are_an_error(folder):
    def spoil(weights: dict) -> dict:
        weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
        return weights

    with pytest.raises(ModelLoadError, match=r"tiny \(llama\) computes logits that are no numbers .*are damaged"):
        load(rewrite(folder, spoil))


def test_an_expert_that_is_missing_is_named_by_what_is_made_of_it(folder):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 32, "intermediate_size": 8}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    MixtralForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"do not hold what model.layers.0.mlp.experts.gate_up_proj is made of"):
        load(rewrite(folder, without("experts.1.w1")))


def test_files_with_python_objects_are_refused_without_being_run(folder):
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Touch()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"its files of weights hold Python objects, which are not run"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_model_of_audio_codes_has_no_vocabulary():
    heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 4)
    with pytest.raises(UnsupportedError, match="has no output layer of one vocabulary"):
        vocabulary_size(SimpleNamespace(get_output_embeddings=lambda: heads))


SIZES = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
DECODER = {"vocab_size": 50, "d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}


@pytest.mark.parametrize(
    "model",
    [
        lambda: RobertaForCausalLM(
            RobertaConfig(**SIZES, is_decoder=True, pad_token_id=1, max_position_embeddings=22, eos_token_id=2)
        ),
        lambda: WhisperForCausalLM(
            WhisperConfig(**DECODER, max_target_positions=20, pad_token_id=1, bos_token_id=1, eos_token_id=2)
        ),
        lambda: MptForCausalLM(MptConfig(vocab_size=50, d_model=8, n_layers=1, n_heads=2, max_seq_len=20)),
    ],
)
def test_the_context_is_as_long_as_the_model_has_positions(model):
    model = model()
    assert context_length(model) == 20
    model(torch.arange(20)[None] + 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.arange(21)[None] + 5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_act": "nonsense"}, "KeyError: 'nonsense'"),
        ({"num_attention_heads": 3}, "hidden size"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "nope"}}, "KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"model_type": "strange"}, "strange"),
        ({"vocab_size": -1}, "tiny"),
    ],
    ids=str,
)
def test_a_configuration_that_transformers_refuses_is_one_sentence(folder, config, said):
    with pytest.raises(ModelLoadError, match=said) as raised:
        load(rewrite(folder, **config))
    assert raised.value.__cause__ is not None or "sizes" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_is_one_sentence_before_the_model_is_loaded_too(folder, strange):
    spec = EngineSpec(str(rewrite(folder, model_type="llama", hidden_act="nonsense")), "tiny", device="cpu")
    with pytest.raises(ModelLoadError, match="KeyError: 'nonsense'"):
        load_described(spec)
    rewrite(strange, model_type="strange")
    with pytest.raises(ModelLoadError, match=r"needs Python code in the model's folder.*trust_remote_code"):
        load_described(spec)


@pytest.fixture
def strange(folder) -> Path:
    (folder / "strange.py").write_text(CODE.format(folder=str(folder)))
    auto_map = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    return rewrite(folder, model_type="strange", auto_map=auto_map)


def test_code_in_a_folder_is_neither_run_nor_asked_about(strange, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(ModelLoadError, match=r"needs Python code in the model's folder.*trust_remote_code"):
        load(strange)
    assert not (strange / "ran").exists()


def test_code_in_a_folder_runs_where_that_is_allowed(strange):
    spec = EngineSpec(str(strange), "tiny", "float32", "cpu", trust_remote_code=True)
    engine = HFEngine.from_pretrained(spec, str(strange))
    assert type(engine.model).__name__ == "StrangeModel"
    assert (strange / "ran").exists()


def test_rotary_embeddings_that_a_later_position_changes_are_known_or_refused():
    import torch
    from transformers import PhimoeConfig, PhimoeForCausalLM

    from mixlm.engines.transformers.position_frequencies import unknown_frequencies

    def model(kind, **more):
        scaling = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 150, **more}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
        scales = {"short_mscale": 1.1, "long_mscale": 1.6}
        with torch.device("cpu"):
            return PhimoeForCausalLM(
                PhimoeConfig(**sizes, **heads, max_position_embeddings=512, rope_parameters={**scaling, **scales})
            )

    longrope = model("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    assert unknown_frequencies(longrope, 512) is None
    assert unknown_frequencies(model("yarn", factor=4.0), 150) is None
    assert unknown_frequencies(model("yarn", factor=4.0), 512) == "PhimoeRotaryEmbedding"
