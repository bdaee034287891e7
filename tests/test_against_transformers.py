"""One member alone writes what transformers' own `generate` writes, token for token where nothing is left to chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import TokenHistory, dense_distribution
from mixlm.engines.transformers.engine import HFEngine
from mixlm.ensemble import Ensemble

PROMPTS = ["Why is the sky blue?", "Name three rivers."]


@contextmanager
def own_attention(engine: HFEngine) -> Iterator[Any]:
    """Give the model transformers' own attention for a while."""
    ours = engine.model.config._attn_implementation
    engine.model.set_attn_implementation("sdpa")
    try:
        yield engine.model
    finally:
        engine.model.set_attn_implementation(ours)


def theirs(engine: HFEngine, ids: np.ndarray, **options: object) -> list[int]:
    import torch

    with own_attention(engine) as model:
        out = model.generate(
            torch.tensor(ids[None]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(engine.vocabulary.end_ids),
            pad_token_id=0,
            suppress_tokens=sorted(engine.vocabulary.special_ids - engine.vocabulary.end_ids),
            **options,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.models
@pytest.mark.parametrize(("member", "prompt", "penalty"), [(0, PROMPTS[1], 1.3), (1, PROMPTS[0], 1.0)])
def test_greedy_is_transformers_greedy(demo_pair: Ensemble, member: int, prompt: str, penalty: float) -> None:
    alone = Ensemble([demo_pair.members[member]])
    engine = alone.members[0].engine
    assert isinstance(engine, HFEngine)
    settings = alone.settings(method="greedy", max_tokens=12, repetition_penalty=penalty, seed=0)
    prompts = alone.encode_prompt(prompt, settings)
    writer = alone.context(settings)
    ours = writer.start(prompts).finish()
    expected = theirs(engine, prompts.ids[0], repetition_penalty=penalty)
    data = b"".join(engine.vocabulary.tokens[i] for i in expected)
    stop = min((place for stop in engine.stops if (place := data.find(stop.encode())) >= 0), default=len(data))
    assert b"".join(token.data for token in ours.tokens) == data[:stop]


@pytest.mark.models
def test_a_prompt_has_the_ids_of_the_models_own_chat_template(
    demo_models: dict[str, Path], demo_pair: Ensemble
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_models["smollm2-135m"])
    for prompt in PROMPTS:
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        ids = demo_pair.encode_prompt(prompt, GenerationOptions()).ids[0]
        assert ids.tolist() == expected


@pytest.mark.models
@pytest.mark.parametrize("member", [0, 1])
def test_the_distribution_of_the_first_token_is_transformers_own(demo_pair: Ensemble, member: int) -> None:
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    engine = demo_pair.members[member].engine
    assert isinstance(engine, HFEngine)
    options = GenerationOptions(sampling={"temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2})
    ids = demo_pair.encode_prompt(PROMPTS[0], options).ids[member]
    with torch.inference_mode(), own_attention(engine) as model:
        logits = model(torch.tensor(ids[None])).logits[:, -1].double()
    banned = [i for i, token in enumerate(engine.vocabulary.tokens) if not token and i not in engine.vocabulary.end_ids]
    processors = LogitsProcessorList(
        [
            SuppressTokensLogitsProcessor(banned),
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = processors(torch.tensor(ids[None]), logits).softmax(-1)[0].numpy()
    history = TokenHistory.from_tokens(ids, ids[:0])
    result = dense_distribution(engine.session().logits(ids)[0], options.member_sampling({}), np.array(banned), history)
    np.testing.assert_allclose(result, expected, atol=2e-5)
