"""docs/performance.md: its computed tables are those of the code, its places those of the script that fills them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from mixlm.binding import LoadedMember
from mixlm.core.rng import Noise
from mixlm.engines.toy import ToyEngine
from mixlm.engines.transformers.dummy_weights import SHAPES
from mixlm.ensemble import Ensemble
from mixlm.models.catalog import CATALOG
from research.benchmark import ComparisonPlan, compare, page, sweep_along
from research.benchmark.__main__ import app
from research.benchmark.roofline import H100, H200, ForwardNeeds, batch_share
from research.benchmark.sweeps import AXES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def measurements() -> dict[str, list[str]]:
    """The commands of the script by name, without the shell."""
    text = (ROOT / "research" / "benchmark" / "performance.sh").read_text(encoding="utf-8")
    lines = [shlex.split(line) for line in text.splitlines() if re.match(r"\s+measure (cpu|gpu)-", line)]
    return {words[1]: words[2:] for words in lines}


def rows(begins: str) -> list[str]:
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {begins} |")]
    return cells(line)[1:]


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split("|")]


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_what_a_step_needs_is_computed(name: str) -> None:
    need = ForwardNeeds.of(SHAPES[name])
    on = [(f"{1e3 * need.seconds(device):.2f}", f"{1 / need.seconds(device):.0f}") for device in (H100, H200)]
    assert rows(name) == [f"{need.bytes() / 1e9:.2f}", f"{2 * need.cache / 1e3:.0f}", *on[0], *on[1]]


def test_the_mixture_of_3b_and_1_5b_is_computed() -> None:
    needs = [ForwardNeeds.of(SHAPES[f"qwen2.5-{size}"]) for size in ("3b", "1.5b")]
    assert f"reads {sum(need.bytes() for need in needs) / 2e9:.2f} GB a token" in PAGE
    seconds = sum(need.seconds(H100) for need in needs) / 2
    assert f"{1e3 * seconds:.2f} ms on an H100, {1 / seconds:.0f} tokens/s" in PAGE


@pytest.mark.slow
def test_the_table_of_batches_is_simulated() -> None:
    for completions in (4, 16, 64, 1000):
        assert rows(f"{completions} sequences") == [f"{n * batch_share(completions, n):.2f}" for n in (2, 3, 4, 8)]
    assert rows("the limit") == [f"{2 * n / (n + 1):.2f}" for n in (2, 3, 4, 8)]


@pytest.mark.slow
def test_guesses_are_right_within_the_bounds() -> None:
    rng = np.random.default_rng(0)
    symbols = np.arange(6)
    for _ in range(3):
        p, q = rng.dirichlet(np.full(6, 0.5), size=2)
        draws = [Noise(1, 0, i) for i in range(4000)]
        right = np.mean([draw.sample(symbols, np.log(p)) == draw.sample(symbols, np.log(q)) for draw in draws])
        apart = 0.5 * np.abs(p - q).sum()
        assert (1 - apart) / (1 + apart) - 0.03 < right < 1 - apart + 0.03


def test_every_measurement_has_its_place_and_every_place_its_measurement() -> None:
    places = re.findall(r"<!-- results: (\S+) -->", PAGE)
    assert [name for name in places if not name.startswith("rules-")] == list(measurements())  # those are of rule_page
    assert PAGE.count("<!-- end of results -->") == len(places)


@pytest.mark.parametrize("name", measurements())
def test_the_commands_are_ones_that_the_command_line_takes(name: str) -> None:
    words = measurements()[name]
    with typer.main.get_command(app).make_context("benchmark", list(words)) as context:
        parameters = context.params
    for model in parameters["model"] or []:
        assert model.removeprefix("shape:").partition("#")[0] in {*SHAPES, *CATALOG}
    assert parameters["sweep"] in (None, *AXES)


@pytest.mark.slow
def test_reports_go_into_their_places_and_twice_is_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pair = Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)])
    small: dict[str, Any] = {"tokens": 6, "repeats": 1}
    reports = {
        "cpu-methods": compare(
            pair, ComparisonPlan(methods=["single", "mixture", "speculative"], rivals=True, **small)
        ).as_dict(),
        "cpu-batch-two": sweep_along("batch", pair, ComparisonPlan(places=[1, 2], **small)).as_dict(),
        "cpu-weights": sweep_along(
            "weights", pair, ComparisonPlan(places=[0, 1], methods=["mixture"], **small)
        ).as_dict(),
    }
    file = tmp_path / "performance.md"
    file.write_text(PAGE, encoding="utf-8")
    for name, report in reports.items():
        report["environment"]["command"] = f"__main__.py --tokens 6 --output there/{name}.json"
        (tmp_path / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
    page.main(file, tmp_path)
    text = file.read_text(encoding="utf-8")
    page.main(file, tmp_path)
    assert file.read_text(encoding="utf-8") == text
    begin = PAGE.index("<!-- results: cpu-methods -->")
    assert text.startswith(PAGE[:begin])
    assert "```sh\npython -m research.benchmark --tokens 6\n```" in text
    assert "- transformers toy-1 was left out: it is no model of transformers" in text
    ratio = reports["cpu-methods"]["ratios"]["speculative/mixture"]
    [head, _, *table] = text[text.index("| speed over that of |") :].split("\n\n")[0].splitlines()
    [line] = [row for row in table if row.startswith("| speculative |")]
    values = dict(zip(cells(head), cells(line), strict=True))
    assert values["mixture"] == f"{ratio:.2f}"
    columns = [f"{name}, tokens/s" for name in ("single toy-1", "single toy-2", "conventional", "mixture")]
    assert f"| {' | '.join(['completions at once', *columns, 'mixture/conventional'])} |" in text
    for name in reports:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert f"![{name}](performance/{name}.png)" in text
    untouched = PAGE[PAGE.index("<!-- results: gpu-methods -->") :]
    assert untouched in text
