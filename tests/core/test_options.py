from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import get_type_hints

import pytest

from mixlm.cli.options import generation_option, with_shared
from mixlm.config import SamplingConfig
from mixlm.core.combinations import combination
from mixlm.core.combinations.defer import Defer
from mixlm.core.options import OPTIONS, SAMPLING_OPTIONS, GenerationOptions, Options
from mixlm.core.rule_options import rule_as_dict
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.loading import load
from mixlm.server.limits import ServerLimits
from mixlm.server.model_registry import ServedModel
from mixlm.server.request_parsing import parse_request
from mixlm.server.request_schemas import CommonFields, CompletionBody, Extras
from mixlm.types import Sampling


@dataclass
class Keeper:
    """What `defer` keeps, as a trained gate is."""

    digest: str

    def __call__(self, distribution):
        return distribution


def generation_options(**options) -> GenerationOptions:
    return GenerationOptions().with_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mixtur"}, "method is 'mixtur'; it must be one of mixture, .*did you mean 'mixture'"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number, 1 or more"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"strength": True, "rule": "power"}, "strength is True"),
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 or more"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": None}, "seed is None"),
        ({"sequence": -1}, "sequence is -1"),
        ({"temprature": 1}, "unknown option 'temprature' .did you mean 'temperature'"),
        ({"max_token": 1}, "unknown option 'max_token' .did you mean 'max_tokens'"),
        ({"sampling": {}}, "unknown option 'sampling'"),
        ({"whatever": 1}, "unknown option 'whatever'"),
    ],
)
def test_invalid_options_are_refused_with_the_allowed_values(options, message):
    with pytest.raises(ConfigError, match=message):
        generation_options(**options)


def test_seeds_of_64_bits_are_allowed():
    assert generation_options(seed=2**64 - 1, sequence=2**63).seed == 2**64 - 1


def test_a_generation_without_a_seed_gets_a_random_one():
    assert len({generation_options().seed for _ in range(20)}) == 20
    assert GenerationOptions(seed=5).with_options({"seed": 0}).seed == 0


@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_is_one_string_or_several(stop, expected):
    assert generation_options(stop=stop).stop == expected


@pytest.mark.parametrize("method", ["mixture", "speculative", "auto"])
def test_a_rule_is_not_for_methods_of_the_average(method):
    for rule in ({"mix_then_truncate": True}, {"rule": "geometric"}):
        with pytest.raises(UnsupportedError, match=f"{method} samples the average.*method='layered'"):
            generation_options(method=method, **rule)
    assert generation_options(method="conventional", mix_then_truncate=True).rule == "mean-then-truncate"
    assert generation_options(method="conventional", rule="average").rule is None


def test_a_call_with_a_rule_is_layered_unless_it_says_otherwise():
    plain = generation_options()
    assert plain.with_options({"rule": "max"}).method == "layered"
    assert plain.with_options({"mix_then_truncate": True}).method == "layered"
    assert plain.with_options({"rule": "average"}).method == "mixture"
    assert generation_options(method="conventional").with_options({"rule": "max"}).method == "conventional"
    assert generation_options(method="greedy").with_options({"rule": "max"}).method == "greedy"
    with pytest.raises(UnsupportedError, match="the rule is max"):
        plain.with_options({"rule": "max", "method": "mixture"})
    with pytest.raises(UnsupportedError, match="rule geometric and mix-then-truncate are both given"):
        generation_options(rule="geometric").with_options({"mix_then_truncate": True})


def test_another_rule_begins_with_its_own_parameters():
    contrast = generation_options(rule="contrastive", strength=0.2, alpha=0.3)
    assert contrast.with_options({"seed": 1}).rule_parameters == {"strength": 0.2, "alpha": 0.3}
    assert contrast.with_options({"strength": 0.4}).rule_parameters == {"strength": 0.4, "alpha": 0.3}
    assert contrast.with_options({"rule": "max"}).rule_parameters == {}
    assert contrast.with_options({"rule": "power", "strength": 3.0}).rule_parameters == {"strength": 3.0}
    assert contrast.with_options({"rule": "average"}).rule is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "geometrical"}, "rule is 'geometrical'; it must be one of average, .*did you mean 'geometric'"),
        ({"rule": 3}, "rule is 3; it must be a name, a Combination, or a function"),
        ({"rule": "max", "strength": 2.0}, "strength is given, and rule max has no such parameter"),
        ({"rule": "unite", "strength": 2.0}, "rule unite has no such parameter .it has no parameters"),
        ({"rule": "defer", "alpha": 0.5}, "rule defer has no such parameter .its parameters are strength, by."),
        ({"rule": "geometric", "strength": 0.0}, "strength is 0"),
        ({"rule": "contrastive", "strength": "much"}, "strength is 'much'"),
        ({"rule": "contrastive", "form": "new"}, "form is 'new'; it must be one of weighted, original"),
        ({"strength": 2.0}, "strength is given without a rule"),
        ({"rule": lambda probs, weights: probs[0], "strength": 1.0}, "strength is given, and the rule is no name"),
        ({"rule": "gac", "mix_then_truncate": True}, "rule gac and mix-then-truncate are both given"),
    ],
)
def test_what_is_no_rule_is_refused(options, message):
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        generation_options(method="layered", **options)


def test_a_rule_is_described_by_its_name_and_what_differs_from_its_defaults():
    assert rule_as_dict("power", {"strength": 3.0}) == {"name": "power", "strength": 3.0}
    assert rule_as_dict(combination("contrastive", alpha=0.0)) == {"name": "contrastive", "alpha": 0.0}
    assert rule_as_dict(combination("contrastive")) == {"name": "contrastive"}
    assert rule_as_dict(min) == {"name": "min"}
    for digest in "ab":
        assert rule_as_dict(Defer(accept=Keeper(digest))) == {"name": "defer", "accept": f"Keeper {digest}"}


def test_options_of_a_call_override_those_of_a_member():
    sampling = generation_options(top_k=5).member_sampling({"top_k": 9, "temperature": 0.4})
    assert sampling == Sampling(top_k=5, temperature=0.4)
    assert generation_options().member_sampling({}) == Sampling()


def test_options_accumulate():
    twice = generation_options(top_k=5, max_tokens=7).with_options({"top_p": 0.5})
    assert twice.sampling == {"top_k": 5, "top_p": 0.5}
    assert twice.max_tokens == 7


def test_an_offset_has_the_same_seed_and_another_sequence():
    moved = generation_options(seed=3, sequence=10).with_sequence_offset(2)
    assert (moved.seed, moved.sequence) == (3, 12)


@pytest.mark.parametrize("method", ["mixture", "conventional"])
@pytest.mark.parametrize("member", [{}, {"temperature": 0}])
def test_temperature_zero_in_a_sampling_method_names_greedy(method, member):
    options = generation_options(method=method) if member else generation_options(method=method, temperature=0)
    with pytest.raises(UnsupportedError, match=r"temperature is 0.*method='greedy'"):
        options.member_sampling(member)


def test_greedy_uses_the_untransformed_average_by_default():
    assert generation_options(method="greedy").member_sampling({}) == Sampling(temperature=1.0, top_k=0)
    assert generation_options(method="greedy", temperature=0).member_sampling({}) == Sampling(temperature=1.0, top_k=0)
    sampling = generation_options(method="greedy", temperature=0.5).member_sampling({"repetition_penalty": 1.2})
    assert sampling == Sampling(repetition_penalty=1.2, temperature=0.5, top_k=0)


def test_a_single_member_at_temperature_zero_takes_the_most_likely():
    assert generation_options(method="single", temperature=0).is_greedy({})
    assert generation_options(method="single").is_greedy({"temperature": 0})
    assert not generation_options(method="single", temperature=1).is_greedy({"temperature": 0})
    assert not generation_options(method="mixture", temperature=0).is_greedy({})


def test_sampling_of_the_average_has_all_but_the_penalties():
    options = generation_options(
        method="conventional", mix_then_truncate=True, top_k=3, temperature=0.5, presence_penalty=1
    )
    assert options.member_sampling({}) == Sampling(temperature=1.0, top_k=0, presence_penalty=1)
    assert options.combined_sampling({}) == Sampling(top_k=3, temperature=0.5)
    assert generation_options(method="conventional").combined_sampling({}) is None
    with pytest.raises(UnsupportedError, match=r"temperature is 0.*method='greedy'"):
        generation_options(method="conventional", mix_then_truncate=True, temperature=0).combined_sampling({})


@pytest.mark.parametrize("option", [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}])
def test_a_sampling_option_out_of_range_is_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        generation_options(**option).member_sampling({})


def test_the_keywords_of_generate_are_the_table():
    hints, table = get_type_hints(Options), {**get_type_hints(GenerationOptions), **get_type_hints(Sampling)}
    del table["sampling"]
    assert hints.keys() == table.keys() == OPTIONS.keys()
    assert {name for name in table if hints[name] != table[name]} == {"stop", "tools"}  # in several forms


def test_the_ensemble_file_has_the_sampling_options():
    assert list(SamplingConfig.model_fields) == list(SAMPLING_OPTIONS)


def test_commands_have_the_shared_options():
    command = with_shared()(lambda shared: 0)
    shared = {name for name, spec in OPTIONS.items() if spec.panel}
    assert shared <= signature(command).parameters.keys()
    assert not (OPTIONS.keys() - shared) & signature(command).parameters.keys()


def test_a_default_that_is_zero_is_shown_and_a_value_that_is_zero_is_set():
    assert generation_option("min_p").help.endswith("Default: 0.0.")
    received = []
    values = {
        name: parameter.default for name, parameter in signature(with_shared()(lambda shared: 0)).parameters.items()
    }
    with_shared()(lambda shared: received.append(shared.options()) or 0)(**{**values, "temperature": 0.0, "top_k": 0})
    assert received == [{"temperature": 0.0, "top_k": 0}]


def test_the_http_api_has_the_options_of_the_table():
    by_api = {api: {name for name, spec in OPTIONS.items() if spec.http == api} for api in ("openai", "mixlm")}
    assert by_api["mixlm"] <= Extras.model_fields.keys()
    assert by_api["openai"] <= CommonFields.model_fields.keys()


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() & CommonFields.model_fields.keys()))
def test_a_field_of_requests_with_the_name_of_an_option_is_that_option(name):
    value = {"stop": ["x"], "logit_bias": {"a": 1.0}}.get(name, 1)
    body = CompletionBody(prompt="", **{name: value})
    settings = parse_request(body, ServedModel("toys", load("toy:1", "toy:2")), ServerLimits()).settings
    given = settings.sampling[name] if name in SAMPLING_OPTIONS else getattr(settings, name)
    assert given == (tuple(value) if name == "stop" else value)


def test_the_old_name_of_an_option_still_works():
    with pytest.warns(DeprecationWarning, match="'alternatives' is now 'top_logprobs'"):
        assert generation_options(alternatives=3).top_logprobs == 3
