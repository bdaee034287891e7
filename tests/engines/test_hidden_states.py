"""Hidden states of transformers models: those of a whole forward pass, however a session comes to a position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_transformers_engine import build
from transformers import AutoModelForCausalLM

from mixlm.engines import EngineSpec
from mixlm.engines.contract import random_ids
from mixlm.engines.requests import LogitsAndHidden, LogitsRequest, SampleRequest, SampleResponse
from mixlm.engines.transformers.engine import HFEngine

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_they_are_the_last_layers_behind_its_norm(tmp_path: Path, kind: str) -> None:
    folder = build(tmp_path, kind)
    engine = HFEngine.from_pretrained(EngineSpec("", kind, "float32"), str(folder))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    a, b = random_ids(engine, 30), random_ids(engine, 21, seed=5)

    def whole(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            states = reference(torch.tensor(ids[None]), output_hidden_states=True).hidden_states[-1]
        return np.asarray(states[0].float())

    assert engine.hidden_size == 32
    first, second = engine.session(), engine.session()
    plain = engine.session().logits(a, last=3)
    # A prefill, another sequence in the same call, one more token, a rollback, the same position again.
    for turn in (((first, a[:20], 2), (second, b, 1)), ((first, a[:21], 1),), ((first, a, 3),), ((first, a[:12], 1),)):
        requests = [(session, LogitsRequest(0, ids, last, hidden=True)) for session, ids, last in turn]
        for (_, ids, last), response in zip(turn, engine.respond(requests), strict=True):
            assert isinstance(response, LogitsAndHidden)
            assert response.hidden.dtype == np.float16
            np.testing.assert_allclose(response.hidden, whole(ids)[-last:], atol=4e-3)
            if len(ids) == 30:
                np.testing.assert_allclose(response.logits, plain, atol=1e-4)
    again = engine.respond([(first, LogitsRequest(0, a[:12], hidden=True))])[0]
    np.testing.assert_allclose(again.hidden, whole(a[:12])[-1:], atol=4e-3)
    # Logits that were requested without hidden states run their last token anew where those are requested too.
    third = engine.session()
    engine.respond([(third, LogitsRequest(0, b))])
    late = engine.respond([(third, LogitsRequest(0, b, hidden=True))])[0]
    np.testing.assert_allclose(late.hidden, whole(b)[-1:], atol=4e-3)
    sample = SampleRequest(0, b, lambda row: SampleResponse(int(row.argmax()), 0.0))
    assert engine.respond([(third, sample)])[0].symbol == int(late.logits[0].argmax())
