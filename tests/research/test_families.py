"""Model families answer by the ids alone in every way they are run, or are refused with a sentence."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from research import families


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as in the script: some models amplify the rounding of sums that threads share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FREQUENCIES = {
    "longrope": lambda sizes: Phi3ForCausalLM(
        Phi3Config(
            **sizes,
            max_position_embeddings=256,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "dynamic": lambda sizes: LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FREQUENCIES)
def test_frequencies_that_depend_on_the_length_are_those_of_each_text(kind, monkeypatch):
    def model(_: str) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        built = FREQUENCIES[kind]({**sizes, "vocab_size": families.VOCABULARY, "pad_token_id": 0}).eval()
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
        return built

    monkeypatch.setattr(families, "tiny_model", model)
    row = families.examine(kind)
    assert row["runs"] == "several sequences"
    assert families.is_right(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama4_text",
        "gpt2",
        "phi3",
        "deepseek_v3",
        "deepseek_v4",
        "gemma2",
        "gpt_oss",
        "hrm_text",
        "minimax",
        "bart",
    ],
)
def test_families_give_equal_answers_or_are_refused(family):
    row = families.examine(family)
    assert "untested" not in row
    assert families.is_right(row), row


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "qwen3_5",
    ],
)
def test_models_with_a_recurrent_state_run_what_is_new(family):
    row = families.examine(family)
    assert families.is_right(row), row
    assert row["runs"] in ("one sequence, with snapshots", "one sequence, token by token")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "openai-gpt", "xlm"])
def test_models_that_look_both_ways_are_refused_and_those_without_a_cache_run_whole_texts(family):
    row = families.examine(family)
    assert families.is_right(row), row
    assert row.get("runs") == "one whole text" or "another distribution" in row["refused"]
