"""Units by request: several of one ensemble, on the same engines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import running
from toys import VOCABULARIES, engine, ensemble

from mixlm.core.options import GenerationOptions
from mixlm.loading import load


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_units_are_those_of_an_ensemble_that_was_loaded_with_them(toys, unit):
    expected = load("toy:1", "toy:2", unit=unit).generate("hello", seed=4, max_tokens=20)
    for weights in (None, [1, 1]):
        extras = {"unit": unit, "weights": weights}
        choice = toys.chat(seed=4, max_tokens=20, mixlm=extras).json()["choices"][0]
        assert choice["message"]["content"] == expected.text
        assert choice["mixlm"]["members"] == [one.member for one in expected.tokens]
    text = load("toy:1", "toy:2", unit=unit).generate("one", raw=True, seed=4, max_tokens=20).text
    assert toys.complete(seed=4, max_tokens=20, mixlm={"unit": unit}).json()["choices"][0]["text"] == text


def test_units_are_made_once_and_on_the_same_engines():
    pair = load("toy:1", "toy:2")
    with running(pair) as one:
        served = one.server.registry.find(None)
        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(one.chat, max_tokens=5, mixlm={"unit": "word"}) for _ in range(8)]
            assert {each.result().status_code for each in asked} == {200}
        made = served.in_unit("word")
        assert made is served.in_unit("word")
        assert made.unit.name == "word"
        assert [each.engine for each in made.members] == [each.engine for each in pair.members]
        assert served.in_unit("auto") is pair


def test_a_unit_that_these_members_cannot_meet_in_is_refused():
    engines = [engine(tokens, seed=i) for i, tokens in enumerate(VOCABULARIES[:2])]
    with running(ensemble(engines, defaults=GenerationOptions(method="conventional"))) as one:
        about = one.client.get("/v1/models").json()["data"][0]["mixlm"]
        assert about["unit"] == "piece"
        assert list(about["units"]) == ["piece", "word", "byte"]
        assert about["methods"] == about["units"]["piece"]
        assert "conventional" not in about["units"]["word"]
        for extras, param in (({"unit": "token"}, "mixlm.unit"), ({"unit": "word"}, "mixlm.unit")):
            response = one.chat(messages=[{"role": "user", "content": "ab"}], max_tokens=5, mixlm=extras)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
        extras = {"unit": "word", "method": "mixture"}
        assert one.complete("ab", max_tokens=5, mixlm=extras).status_code == 200
