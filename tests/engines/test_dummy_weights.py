"""Models of a known shape with dummy weights: every engine's contract on a tiny one, the sizes of the real ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixlm.binding import LoadedMember
from mixlm.config import EnsembleConfig, MemberConfig
from mixlm.engines import EngineSpec, load
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids
from mixlm.engines.toy import WORD_TOKENS, ToyEngine
from mixlm.engines.transformers import dummy_weights as shape
from mixlm.engines.transformers.dummy_weights import SHAPES, DummyWeightsEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ModelNotFoundError
from mixlm.loading import load_config
from mixlm.scoring.score import score_answers

TINY: dict[str, Any] = {
    **SHAPES["qwen2.5-0.5b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
SMALLER: dict[str, Any] = {**SHAPES["llama-3.2-1b"], **{k: v for k, v in TINY.items() if k.endswith("_size")}}
SMALLER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SMALLER |= {"vocab_size": 350}
# Of the published weights.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-68m": 68_030_208,
    "llama-160m": 162_417_408,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}


def tiny(sizes: dict[str, Any] = TINY, dtype: str = "float32") -> DummyWeightsEngine:
    return DummyWeightsEngine(EngineSpec("shape:tiny", "", dtype, "cpu"), sizes)


@pytest.fixture(scope="module")
def engine() -> DummyWeightsEngine:
    return tiny()


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_model_it_is_named_after(name: str) -> None:
    with torch.device("meta"):
        model = shape.from_shape(SHAPES[name], torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_the_filled_model_computes_what_one_built_with_its_weights_computes(engine: DummyWeightsEngine) -> None:
    for sizes, filled in ((TINY, engine), (SMALLER, tiny(SMALLER))):
        plain = shape.from_shape(sizes, torch.float32).eval()
        plain.load_state_dict(filled.model.state_dict())
        ids = random_ids(filled, 30)
        with torch.inference_mode():
            expected = plain(torch.tensor(ids[None])).logits[0, -1].numpy()
        np.testing.assert_allclose(filled.session().logits(ids)[0], expected, atol=1e-4)


def test_logits_depend_on_the_ids_and_are_finite(engine: DummyWeightsEngine) -> None:
    ids = random_ids(engine, 12)
    first = engine.session().logits(ids)
    assert np.isfinite(first).all()
    assert first.std() > 0.01
    other = engine.session().logits(np.concatenate([random_ids(engine, 1, 5), ids[1:]]))
    assert np.abs(first - other).max() > 1e-3


def test_weights_are_filled_everywhere_and_tied_where_the_model_ties_them(engine: DummyWeightsEngine) -> None:
    for name, parameter in engine.model.named_parameters():
        values = parameter.detach().flatten()
        assert (values == 1).all() if name.endswith("norm.weight") else 0.01 < values.std() < 0.03
    embedding = engine.model.get_input_embeddings().weight
    assert engine.model.get_output_embeddings().weight is embedding
    assert engine.weights_bytes == sum(parameter.numel() * 4 for parameter in engine.model.parameters())


def test_a_shape_describes_itself(engine: DummyWeightsEngine) -> None:
    assert engine.name == "shape:tiny"
    assert engine.notes == (f"shape:tiny: {shape.LABEL}",)
    assert "filled" in engine.details["weights"]


def test_bfloat16_weights_keep_exact_frequencies() -> None:
    model = tiny(dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_many_sequences_run_in_one_forward(engine: DummyWeightsEngine) -> None:
    assert engine.runner.batches


def test_shapes_and_toys_share_a_vocabulary() -> None:
    engines = [tiny(), tiny(SMALLER), ToyEngine()]
    ensemble = Ensemble([LoadedMember(engine, f"m{i}") for i, engine in enumerate(engines)])
    assert ensemble.unit.name == "token"
    drawable = [set(ensemble.unit.symbols(i)) - {-1, ensemble.unit.end} for i in range(3)]
    assert drawable[0] == drawable[1] == drawable[2] == set(range(len(WORD_TOKENS)))
    two = Ensemble([LoadedMember(engine, f"m{i}") for i, engine in enumerate(engines[:2])])
    assert (two.unit.symbols(1) >= 0).sum() == 350 - 1  # all but the begin mark
    completion = two.generate("the river", max_tokens=5, seed=1)
    assert completion.usage.tokens == 5


def test_an_unknown_shape_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no shape 'qwen2\.5-3'") as caught:
        load(EngineSpec("shape:qwen2.5-3", ""))
    assert "qwen2.5-3b" in str(caught.value)


def test_a_shape_is_loaded_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "SHAPES", {"tiny": TINY})
    actual = load(EngineSpec("shape:tiny", "mine", "float32", "cpu"))
    assert isinstance(actual, DummyWeightsEngine)
    assert actual.name == "mine"


def test_a_second_model_of_a_shape_has_weights_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "SHAPES", {"tiny": TINY})
    names = ["shape:tiny", "shape:tiny", "shape:tiny#2"]
    config = EnsembleConfig(members=tuple(MemberConfig(model=name, dtype="float32") for name in names))
    first, same, other = (member.engine for member in load_config(config).members)
    assert first is same
    assert other is not first
    assert other.name == "shape:tiny#2"
    weights = [engine.model.get_input_embeddings().weight for engine in (first, other)]  # type: ignore[attr-defined]
    assert weights[0].data_ptr() != weights[1].data_ptr()


@pytest.mark.parametrize("ends", [False, True])
def test_answers_to_several_questions_are_scored_in_few_passes(engine: DummyWeightsEngine, ends: bool) -> None:
    ensemble = Ensemble([LoadedMember(engine, "tiny")])
    questions = [" the river" * count for count in (9, 3, 14, 80)]
    pairs = [(question, answer) for question in questions for answer in (" the", " the river the", " river" * 9)]
    passes: list[int] = []
    run = engine.runner._forward

    def counted(inputs: Any) -> Any:
        passes.append(len(inputs))
        return run(inputs)

    engine.runner._forward = counted
    try:
        together = score_answers(ensemble, pairs, ends=ends)
    finally:
        del engine.runner._forward
    apart = [score_answers(ensemble, [pair], ends=ends) for pair in pairs]
    np.testing.assert_allclose(together.logprobs, np.concatenate([scores.logprobs for scores in apart]), atol=1e-4)
    np.testing.assert_allclose(
        together.prompt_bits, np.concatenate([scores.prompt_bits for scores in apart]), rtol=1e-5
    )
    assert max(passes) == 3
    assert sum(passes) > len(pairs)
    assert len(passes) < len(pairs)
