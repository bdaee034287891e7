"""Tables and figures from canned findings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from canned import OURS, THEIRS, accuracy, curves, difference, findings, speed

from mixlm.errors import ConfigError, MixlmError
from research import figures
from research.paper import charts, joined, read
from research.paper.tables import markdown


def row(text: str, begins: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {begins} |")]
    assert len(lines) == 1, lines
    return [line.strip() for line in lines[0].strip("|").split("|")][1:]


def accuracies(label: str) -> tuple[object, ...]:
    first, second = label.split(" + ")
    return (
        accuracy(label, f"single:{first}", 0.60),
        accuracy(label, f"single:{second}", 0.50, seeds=1),
        accuracy(label, "mixture", 0.625),
        accuracy(label, "conventional", 0.615),
    )


def test_the_papers_numbers_stand_beside_those_of_its_own_models() -> None:
    text = markdown(findings("table2", accuracies(THEIRS)))
    assert row(text, "Qwen-3B (k = 5)") == ["60.00 ± 1.00", "79.77"]
    assert row(text, "Qwen-Math-1.5B (k = 5)") == ["50.00", "79.39"]
    assert row(text, "ME (k = 5)") == ["62.50 ± 1.00 (+2.50)", "82.97 (+3.20)"]
    assert row(text, "CE (k = 5)") == ["61.50 ± 1.00 (+1.50)", "83.14 (+3.37)"]
    apart = text.partition("## The paper's own models")[2].partition("## Notes")[0]
    assert "Openchat + Nous-Hermes: ME (k = 10)" in apart
    assert "Qwen-3B + Qwen-Math-1.5B" not in apart


def test_the_papers_numbers_stand_apart_from_those_of_other_models() -> None:
    text = markdown(findings("table3", accuracies(OURS), reduced="reduced: 20 questions a task, 2 seeds"))
    assert "**Reduced: 20 questions a task, 2 seeds.**" in text
    assert row(text, "ME (k = 5)") == ["62.50 ± 1.00 (+2.50)"]
    whole = row(text, "Openchat + Deepseek-7B + Mistral-7B: CE (k = 10)")
    assert whole == ["68.23 (+0.21)", "58.50 (+2.03)", "44.96 (+0.11)", "78.69 (+5.30)"]
    assert row(text, "Mistral-7B") == ["46.90", "56.22", "41.25", "68.75"]


def test_the_comparison_of_me_and_ce_is_stated() -> None:
    pair = difference((0.5, 0.5), 0.01, (-0.0123, 0.0323), 0.4567)
    text = markdown(findings("table2", accuracies(OURS), differences=(pair,)))
    assert "## ME against CE" in text
    assert row(text, OURS)[2:] == ["0.5, 0.5", "+1.00", "-1.23 to +3.23", "0.457", "20", "3", "2"]


def test_speeds_and_their_ratios() -> None:
    text = markdown(findings("table4", speeds=(speed(THEIRS, parallel=25.0),)))
    assert row(text, "single: Qwen-3B") == ["40.00 (2.00×)", ""]
    assert row(text, "single") == ["48.00 (2.40×)", "63.68 (1.95×)"]
    assert row(text, "CE (sequential)") == ["20.00 (1.00×)", "32.71 (1.00×)"]
    assert row(text, "CE (parallel)") == ["25.00 (1.25×)", "34.58 (1.05×)"]
    assert row(text, "ME") == ["45.00 (2.25×)", "58.25 (1.78×)"]
    assert row(text, "Openchat + Nous-Hermes")[3] == "51.33 (1.89×)"
    text = markdown(findings("table4", speeds=(speed(OURS),)))
    assert row(text, "CE (parallel)") == ["not measured"]
    assert row(text, "Qwen-3B + Qwen-Math-1.5B")[0] == "63.68 (1.95×)"


def test_figures_say_what_the_paper_has_only_as_a_plot() -> None:
    for name in ("figure2", "figure4"):
        text = markdown(curves(name, "mixture"), image=f"{name}.svg")
        assert f"]({name}.svg)" in text
        assert text.count("plot only") >= 2
    assert "| toy:1 + toy:2 | 0.5 | 50.00 | 40.00 / 60.00 |" in markdown(curves("figure2", "mixture"))


@pytest.mark.slow
def test_accuracy_curves_have_the_numbers_and_their_bands() -> None:
    figure = charts.draw(curves("figure4", "mixture", "conventional"))
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == ["ME", "CE"]
    line = axes.get_lines()[0]
    assert list(line.get_xdata()) == [0.0, 0.5, 1.0]
    assert list(line.get_ydata()) == pytest.approx([30, 40, 50])
    assert len(axes.collections) == 2
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(51)
    assert axes.get_xlabel() == "λ: weight of toy:1"
    assert axes.get_ylabel() == "accuracy, %"
    assert OURS in axes.get_title()
    styles = {line.get_linestyle() for line in axes.get_lines()}
    assert len(styles) == 2  # to be told apart in grey


def test_two_seeds_are_too_few_for_bands() -> None:
    findings_of_two = curves("figure4", "mixture")
    findings_of_two = replace(
        findings_of_two,
        accuracies=tuple(
            replace(accuracy, score=replace(accuracy.score, values=accuracy.score.values[:2]))
            for accuracy in findings_of_two.accuracies
        ),
    )
    figure = charts.draw(findings_of_two)
    assert len(figure.axes[0].collections) == 0
    assert "too few seeds for bands" in figure.get_supxlabel()


def test_the_trade_of_accuracy_and_speed() -> None:
    top, bottom = charts.draw(curves("figure2", "mixture")).axes
    assert list(top.get_lines()[0].get_ydata()) == pytest.approx([30, 40, 50])
    assert list(bottom.get_lines()[0].get_ydata()) == [60, 50, 40]
    assert [line.get_label() for line in bottom.get_lines()] == ["ME", "toy:1 alone", "toy:2 alone"]
    assert "tokens/s" in bottom.get_ylabel()


def test_bars_of_several_machines() -> None:
    figure = findings("figure3", speeds=(speed(OURS), speed(OURS, "another machine", 25.0)), reduced="reduced: much")
    left, right = charts.draw(figure).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([48.0, 20.0, 45.0])
    assert [bar.get_height() for bar in right.patches] == pytest.approx([48.0, 20.0, 25.0, 45.0])
    assert (left.get_title(), right.get_title()) == ("a processor", "another machine")
    assert left.get_ylabel() == "tokens/s"
    assert "reduced: much" in left.figure.get_supxlabel()


def test_findings_are_kept_and_joined(tmp_path: Path) -> None:
    whole = curves("figure4", "mixture", "conventional")
    path = tmp_path / "one.json"
    path.write_text(json.dumps(whole.as_dict()))
    assert read(path) == whole
    current, there = findings("figure3", speeds=(speed(OURS),)), findings("figure3", speeds=(speed(OURS, "b"),))
    path.write_text(json.dumps(there.as_dict()))
    assert [speed.machine for speed in joined(current, [path]).speeds] == ["a processor", "b"]
    with pytest.raises(ConfigError, match="both have"):
        joined(there, [path])
    with pytest.raises(ConfigError, match="holds figure3"):
        joined(whole, [path])
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no results"):
        read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_without_matplotlib_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MixlmError, match="figures need matplotlib") as caught:
        figures.require()
    assert caught.value.hint == "pip install 'mixlm[paper]'"
