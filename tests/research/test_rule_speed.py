"""The measurement of rules runs on toys, keeps its rows, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlm.errors import ConfigError
from research.scripts import rule_page, rule_speed


@pytest.mark.slow
def test_rows_are_kept_with_what_they_were_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rules.jsonl"
    arguments = [
        "toy:1",
        "toy:2",
        "--engine",
        "auto",
        "--tokens",
        "3",
        "--prompt",
        "the sea",
        "--dtype",
        "float32",
        "--json",
        str(path),
    ]
    rule_speed.main([*arguments, "--rules", "max"])
    rule_speed.main([*arguments, "--rules", "guidance,max"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["rule", "max", "rule", "guidance", "max"]
    assert out[1] == out[4]  # not measured again
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["rule"] for row in rows] == ["max", "guidance"]
    for row in rows:
        assert {method: row[method]["forwards"] for method in ("single", "conventional")} == {
            "single": 1.0,
            "conventional": 2.0,
        }
        assert {"processor", "versions", "settings"} == row["about"].keys()
        assert {"command", "engines", "cores"} <= row["environment"].keys()
        assert row["about"]["settings"]["dtype"] == "float32"
    page = tmp_path / "page.md"
    page.write_text("<!-- results: rules-toys -->\n<!-- end of results -->\n")
    rule_page.main([f"toys={path}", "--page", str(page)])
    assert "| guidance | " in page.read_text()
    assert "rule_speed toy:1 toy:2 --rules max,guidance --tokens 3 --repeats 1 --dtype float32" in page.read_text()
    assert (tmp_path / "performance" / "rules.png").is_file()
    # A row that was cut off is measured again.
    path.write_text(path.read_text()[:-100])
    rule_speed.main([*arguments, "--rules", "guidance,max"])
    assert capsys.readouterr().out.splitlines()[-1] == out[1]
    assert path.read_text().count("\n") == 2
    with pytest.raises(ConfigError, match="other settings"):
        rule_speed.main([*arguments, "--prompt", "the river"])


def test_guidance_reads_one_model_after_two_system_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(ensemble, *_):
        seen.append([(member.engine.name, member.engine.prompts.system) for member in ensemble.members])
        raise ValueError("enough")

    monkeypatch.setattr(rule_speed, "measured", measured)
    rule_speed.main(
        ["toy:1", "toy:2", "--engine", "auto", "--rules", "max,guidance", "--system", "short", "--negative", "long"]
    )
    assert seen == [[("toy:1", None), ("toy:2", None)], [("toy:1", "short"), ("toy:1", "long")]]
