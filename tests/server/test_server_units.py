"""Units by request: several of one ensemble, on the same engines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving import running
from toys import VOCABULARIES, engine, make_ensemble

from mixlm.choices import METHODS
from mixlm.core.combinations.defer import Defer
from mixlm.core.options import OPTIONS, GenerationOptions
from mixlm.loading import load
from mixlm.routing import Observes


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_a_requested_unit_is_that_of_an_ensemble_loaded_with_it(toys, unit):
    expected = load("toy:1", "toy:2", unit=unit).generate("hello", seed=4, max_tokens=20)
    for weights in (None, [1, 1]):
        extras = {"unit": unit, "weights": weights}
        choice = toys.chat(seed=4, max_tokens=20, mixlm=extras).json()["choices"][0]
        assert choice["message"]["content"] == expected.text
        assert choice["mixlm"]["members"] == [token.member for token in expected.tokens]
    text = load("toy:1", "toy:2", unit=unit).generate("one", raw=True, seed=4, max_tokens=20).text
    assert toys.complete(seed=4, max_tokens=20, mixlm={"unit": unit}).json()["choices"][0]["text"] == text


@pytest.mark.slow
def test_units_are_built_once_and_on_the_same_engines():
    pair = load("toy:1", "toy:2")
    with running(pair) as server:
        model = server.app.registry.get(None)
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(server.chat, max_tokens=5, mixlm={"unit": "word"}) for _ in range(8)]
            assert {future.result().status_code for future in futures} == {200}
        ensemble_by_word = model.with_unit("word")
        assert ensemble_by_word is model.with_unit("word")
        assert ensemble_by_word.unit.name == "word"
        assert [member.engine for member in ensemble_by_word.members] == [member.engine for member in pair.members]
        assert model.with_unit("auto") is pair


def test_a_unit_that_these_members_cannot_meet_in_is_refused():
    engines = [engine(tokens, seed=i) for i, tokens in enumerate(VOCABULARIES[:2])]
    with running(make_ensemble(engines, defaults=GenerationOptions(method="conventional"))) as server:
        about = server.client.get("/v1/models").json()["data"][0]["mixlm"]
        assert about["unit"] == "piece"
        assert list(about["units"]) == ["piece", "word", "byte"]
        assert about["methods"] == about["units"]["piece"]
        assert "conventional" not in about["units"]["word"]
        for extras, param in (({"unit": "token"}, "mixlm.unit"), ({"unit": "word"}, "mixlm.unit")):
            response = server.chat(messages=[{"role": "user", "content": "ab"}], max_tokens=5, mixlm=extras)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
        extras = {"unit": "word", "method": "mixture"}
        assert server.complete("ab", max_tokens=5, mixlm=extras).status_code == 200


@pytest.mark.slow
def test_the_combination_rules_that_are_listed_are_those_that_work(toys):
    about = toys.client.get("/v1/models").json()["data"][0]["mixlm"]
    assert (about["rule"], about["routed"]) == ("average", False)
    assert about["rule_parameters"]["contrastive"]["alpha"] == {"default": 0.1, "choices": []}
    assert [*about["rule_parameters"]] == [rule for rule in about["rules"] if rule in about["rule_parameters"]]
    for rule, parameters in about["rule_parameters"].items():
        extras = {name: parameter["default"] for name, parameter in parameters.items()}
        assert toys.chat(max_tokens=1, mixlm={"rule": rule, "method": "layered", **extras}).status_code == 200
    for rule in OPTIONS["rule"].choices:
        name = "union-top-k" if rule == "unite" else rule
        for method in METHODS:
            extras = {"rule": rule, "method": method}
            works = toys.chat(seed=1, max_tokens=1, mixlm=extras).status_code == 200
            assert works == (method in about["rules"].get(name, ())), extras
    with running(load("toy:1", "toy:2", rule=Defer(accept=lambda probs: probs))) as server:
        about = server.client.get("/v1/models").json()["data"][0]["mixlm"]
        assert about["rule"] == "defer"
        assert "defer" not in about["rule_parameters"]  # a strength would replace the function
    with running(load("toy:1", "toy:2", rule="max", method="layered", router=lambda prompt, text: [1, 2])) as server:
        about = server.client.get("/v1/models").json()["data"][0]["mixlm"]
        assert (about["rule"], about["routed"]) == ("max", True)


class BySurprise:
    """The second member where the first is unsure."""

    observes = Observes(0, top_k=5)

    def begin(self, context):
        return lambda state, seen: np.array([0.9, 0.1] if np.exp(seen.logprobs[0]) > 0.3 else [0.2, 0.8])


@pytest.mark.slow
def test_a_router_that_observes_a_member_serves_requests_that_run_together():
    ensemble = load("toy:1", "toy:2", router=BySurprise())
    with running(ensemble) as server:
        about = server.client.get("/v1/models").json()["data"][0]["mixlm"]
        assert about["rules"]["max"] == ["conventional", "greedy"]
        for method in ("mixture", "speculative"):
            body = server.complete(["a", "one river"], n=2, seed=7, max_tokens=6, mixlm={"method": method}).json()
            for index, prompt in enumerate(["a", "a", "one river", "one river"]):
                options = {"seed": 7, "sequence": index, "max_tokens": 6, "raw": True, "method": method}
                assert body["choices"][index]["text"] == ensemble.generate(prompt, **options).text
                observed = ensemble.generate(prompt, **options).usage.members["toy:1"]
                assert observed.forwards > 0
        refused = server.complete("a", mixlm={"method": "layered"})
        assert refused.status_code == 400
        assert "the router observes toy:1" in refused.json()["error"]["message"]
