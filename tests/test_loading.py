from __future__ import annotations

import sys
from types import ModuleType

import pytest

import mixlm
from mixlm.config import parse_config
from mixlm.engines.toy import ToyEngine
from mixlm.errors import ConfigError, MixlmError, ModelNotFoundError
from mixlm.loading import load, load_config


def test_models_become_members_in_their_order_with_equal_weights():
    ensemble = load("toy:1", "toy:2")
    assert ensemble.names == ("toy:1", "toy:2")
    assert ensemble.weights.tolist() == [0.5, 0.5]
    assert ensemble.defaults.method == "mixture"
    assert all(isinstance(member.engine, ToyEngine) for member in ensemble.members)


def test_options_reach_the_ensemble():
    ensemble = load("toy:1", "toy:2", weights=[3, 1], method="conventional", unit="piece", top_k=3, temperature=0.5)
    assert ensemble.weights.tolist() == [0.75, 0.25]
    assert ensemble.defaults.method == "conventional"
    assert ensemble.unit.name == "piece"
    assert [member.sampling for member in ensemble.members] == [{"top_k": 3, "temperature": 0.5}] * 2


def test_members_that_name_one_model_share_it_and_have_names_of_their_own():
    ensemble = load("toy:1", "toy:1", "toy:2", "toy:1")
    assert ensemble.names == ("toy:1", "toy:1-2", "toy:2", "toy:1-3")
    first, second, other, third = (member.engine for member in ensemble.members)
    assert first is second is third
    assert first is not other


def test_a_file_becomes_an_ensemble(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text(
        'method = "conventional"\nsystem = "of"\n[sampling]\ntop_k = 9\ntemperature = 0.5\n'
        '[[members]]\nmodel = "toy:1"\nweight = 3\nname = "one"\n'
        '[[members]]\nmodel = "toy:1"\nweight = 1\n[members.sampling]\ntop_k = 2\n'
    )
    for source in (path, str(path)):
        ensemble = load(source)
        assert ensemble.names[0] == "one"
        assert ensemble.members[0].engine is ensemble.members[1].engine
        assert ensemble.weights.tolist() == [0.75, 0.25]
        assert (ensemble.defaults.method, ensemble.defaults.system) == ("conventional", "of")
        assert [member.sampling for member in ensemble.members] == [
            {"top_k": 9, "temperature": 0.5},
            {"top_k": 2, "temperature": 0.5},
        ]


def test_what_is_given_beside_a_file_goes_over_it(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text(
        'method = "conventional"\n[sampling]\ntop_k = 9\n[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n'
    )
    ensemble = load(path, weights=[1, 3], top_k=4, method="greedy", unit="piece")
    assert ensemble.weights.tolist() == [0.25, 0.75]
    assert ensemble.members[0].sampling == {"top_k": 4}
    assert ensemble.defaults.method == "greedy"
    assert ensemble.unit.name == "piece"


def test_a_file_keeps_its_method_when_none_is_given(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text('method = "greedy"\nunit = "piece"\n[[members]]\nmodel = "toy:1"\n')
    ensemble = load(path)
    assert (ensemble.defaults.method, ensemble.unit.name) == ("greedy", "piece")


def test_no_model_is_refused():
    with pytest.raises(ConfigError, match="no model was named"):
        load()


def test_an_unknown_model_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="nothing-of-this-name"):
        load("nothing-of-this-name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "temprature.*did you mean 'temperature'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": "many"}, "top_k"),
        ({"method": "mixtur"}, "'mixtur'.*'mixture'"),
        ({"unit": "words"}, "'words'.*'piece'"),
        ({"dtype": "int8"}, "'int8'.*'bfloat16'"),
        ({"weights": [1, 2]}, "2 weights .* for 1 member"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        load("toy:1", **options)


def test_each_model_is_announced_once_before_it_is_loaded():
    seen: list[str] = []
    members = [{"model": "toy:1", "name": "first"}, {"model": "toy:2"}, {"model": "toy:1"}]
    load_config(parse_config({"members": members}, "here"), progress=seen.append)
    assert seen == ["first", "toy:2"]


def test_a_loaded_ensemble_writes():
    completion = mixlm.load("toy:1", "toy:2").generate("the bird", seed=0, max_tokens=5)
    assert len(completion.tokens) == 5
    assert completion.text


def test_a_file_names_the_rule_its_parameters_and_the_roles(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text(
        '[combination]\nrule = "contrastive"\nstrength = 0.2\n'
        '[[members]]\nmodel = "toy:1"\nrole = "amateur"\n[[members]]\nmodel = "toy:2"\nrole = "expert"\n'
    )
    ensemble = load(path)
    assert (ensemble.defaults.rule, ensemble.defaults.rule_parameters) == ("contrastive", {"strength": 0.2})
    assert ensemble.defaults.method == "layered"
    assert [member.role for member in ensemble.members] == ["amateur", "expert"]
    turned = load("toy:2", "toy:1", rule="contrastive", strength=0.2)
    options = {"seed": 3, "max_tokens": 8}
    assert ensemble.generate("the", **options).text == turned.generate("the", **options).text
    assert load(path, rule="max").defaults.rule_parameters == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[combination]\nrule = "contrast"\n', r"combination.rule is 'contrast'"),
        ('rule = "contrast"\n', r"toml: rule is 'contrast'"),
        ("[combination]\nstrength = 1.0\n", "combination.rule is missing"),
        ('[combination]\nrule = "power"\nexponent = 2.0\n', "unknown key 'combination.exponent'.*strength"),
        ("strength = 2.0\n", "write it below .combination"),
        ('rule = "max"\n[combination]\nrule = "min"\n', "rule and .combination. are both given"),
        ('rule = "max"\n[[members]]\nmodel = "toy:3"\nrole = "expert"\n', "members.0.role is 'expert', and rule max"),
        ('[[members]]\nmodel = "toy:3"\nrole = "expert"\n', "toy:3 has the role 'expert', and there is no rule"),
        ('rule = "contrastive"\n[router]\nkind = "prompt"\n', "a router gives weights, and rule contrastive"),
        ('method = "single"\nrule = "max"\n', "method is 'single', which samples one member, and the rule is 'max'"),
        ('method = "auto"\nrule = "max"\n', "method auto samples the average, and the rule is max"),
        ('[combination]\nrule = "contrastive"\nalpha = 2.0\n', "alpha is 2.0; it must be from 0 to 1"),
        ('[combination]\nrule = "guidance"\nstrength = -1.0\n', "strength is -1.0; for rule guidance it must be"),
        ('rule = "proxy"\n', "rule proxy combines 3 members .base, tuned, untuned., and there are 2"),
    ],
)
def test_what_is_no_rule_in_a_file_is_refused(tmp_path, text, message):
    path = tmp_path / "pair.toml"
    path.write_text(text + '[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n')
    with pytest.raises(MixlmError, match=message):
        load(path).generate("a", max_tokens=1)


@pytest.mark.parametrize("rule", ["max", lambda probs, weights: probs[0]])
def test_a_rule_with_a_method_that_has_none_is_refused(rule):
    for method, message in (("single", "single"), ("mixture", "method mixture samples the average, and the rule is")):
        with pytest.raises(MixlmError, match=message):
            load("toy:1", "toy:2", rule=rule, method=method)


def test_a_rule_of_ones_own_is_given_as_a_function():
    ensemble = load("toy:1", "toy:2", rule=lambda probs, weights: weights @ probs)
    assert ensemble.defaults.method == "layered"
    assert ensemble.generate("the", seed=1, max_tokens=3).usage.tokens == 3


def test_what_is_loaded_is_said_in_a_notebook_and_not_to_a_file(monkeypatch, capfd):
    mixlm.load("toy:1", "toy:2", "toy:1")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    mixlm.load("toy:1", "toy:2", "toy:1")
    assert capfd.readouterr() == ("", "loading toy:1\nloading toy:2\n")
