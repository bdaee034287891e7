"""transformers' own generation beside mixlm's: what runs, what is left out, and that models are as before."""

from __future__ import annotations

import pytest
from tiny import shapes

from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.engines.transformers.attention import ATTENTION_NAME
from mixlm.ensemble import Ensemble
from research.benchmark import ComparisonPlan, compare
from research.benchmark.rivals import ASSISTED, Rival, available_rivals


@pytest.mark.slow
def test_each_member_alone_and_both_together_are_rows_of_their_own() -> None:
    report = compare(shapes((1, 3)), ComparisonPlan(12, 1, methods=["single", "mixture"], rivals=True))
    by_label = {run.label: run for run in report.runs}
    assert list(by_label)[3:] == ["transformers small", "transformers large", ASSISTED]
    assert by_label["transformers large"].forwards == {"large": 12}
    assisted = by_label[ASSISTED]
    assert assisted.members == ("large", "small")
    assert assisted.draft == "small"
    assert assisted.forwards["small"] >= assisted.forwards["large"] > 0
    for run in list(by_label.values())[3:]:
        assert run.method == "transformers"
        assert run.tokens_per_second > 0
        assert run.outside_forwards_share is run.predicted_tokens_per_second is None
    wanted = {"mixture/transformers large", f"mixture/{ASSISTED}", "single small/transformers small"}
    assert set(report.ratios) >= wanted
    assert any("small drafts; its distribution is not the ensemble's" in note for note in report.notes)
    assert any("dummy weights" in note for note in report.notes)


def test_generation_gets_the_same_options_and_the_weight_of_the_larger_member() -> None:
    rivals, _ = available_rivals(shapes((1, 3)), "the river", {"seed": 1, "top_k": 7, "temperature": 0.5, "min_p": 0.1})
    for rival in rivals:
        options = rival._options
        assert (options["top_k"], options["temperature"], options["min_p"], options["top_p"]) == (7, 0.5, 0.1, 1.0)
        assert options["do_sample"]
    assert rivals[-1]._options["assistant_ensemble_weight"] == 0.75
    assert "assistant_ensemble_weight" not in rivals[0]._options


def test_equal_seeds_write_equal_texts_and_models_are_as_before() -> None:
    ensemble = shapes()
    rival = Rival(ensemble, (1,), "the river", {"seed": 1})
    assert rival.measure(1, 8).bytes == rival.measure(1, 8).bytes
    model = ensemble.members[1].engine.model  # type: ignore[attr-defined]
    assert model.config._attn_implementation == ATTENTION_NAME
    assert not model._forward_pre_hooks
    assert ensemble.generate("the river", max_tokens=3, seed=1, ignore_end=True).usage.tokens == 3


def test_what_cannot_run_is_left_out_with_a_note() -> None:
    toys = Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)])
    rivals, notes = available_rivals(toys, "the river", {})
    assert not rivals
    assert notes == [
        "transformers toy-1 was left out: it is no model of transformers",
        "transformers toy-2 was left out: it is no model of transformers",
        f"{ASSISTED} was left out: it is no model of transformers",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"presence_penalty": 0.5}, "presence and frequency penalties"), ({"temperature": 0.0}, "temperature is 0")],
)
def test_options_that_it_has_not_are_said(options: dict[str, float], reason: str) -> None:
    rivals, notes = available_rivals(shapes(), "the river", options)
    assert not rivals
    assert all(reason in note for note in notes)


def test_a_weight_of_nothing_and_one_model_twice_have_no_assistant() -> None:
    ensemble = shapes((0, 1))
    assert (
        f"{ASSISTED} was left out: it needs weights between 0 and 1" in available_rivals(ensemble, "the river", {})[1]
    )
    engine = ensemble.members[0].engine
    twice = Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")])
    assert f"{ASSISTED} was left out: both members are one model" in available_rivals(twice, "the river", {})[1]
    shared = Ensemble([LoadedMember(engine, "a"), LoadedMember(engine.replica(), "b")])
    assert f"{ASSISTED} was left out: both members are one model" in available_rivals(shared, "the river", {})[1]


def test_adapters_are_mixlms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = shapes()
    monkeypatch.setattr(ensemble.members[0].engine, "adapter", "somewhere")
    rivals, notes = available_rivals(ensemble, "the river", {})
    assert [rival.label for rival in rivals] == ["transformers large"]
    assert "transformers small was left out: its adapter is switched on by mixlm alone" in notes


@pytest.mark.slow
def test_agreement_by_construction_is_mixlms_own() -> None:
    report = compare(shapes(), ComparisonPlan(4, 1, methods=["mixture"], rivals=True, agreement=0.5))
    assert [run.label for run in report.runs] == ["mixture", "transformers small", "transformers large"]
    assert any("agreement by construction is not known to it" in note for note in report.notes)
