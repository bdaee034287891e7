"""The measurement of rules runs on toys, keeps its rows, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research.scripts import rule_page, rule_speed


def test_rows_are_kept_with_what_they_were_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rules.json"
    arguments = ["toy:1", "toy:2", "--tokens", "3", "--prompt", "the sea", "--dtype", "float32", "--json", str(path)]
    rule_speed.main([*arguments, "--rules", "max"])
    rule_speed.main([*arguments, "--rules", "guidance,max"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["rule", "max", "rule", "guidance", "max"]
    assert out[1] == out[4]  # not measured again
    report = json.loads(path.read_text())
    assert list(report["rows"]) == ["max", "guidance"]
    for row in report["rows"].values():
        assert {method: row[method]["forwards"] for method in ("single", "conventional")} == {
            "single": 1.0,
            "conventional": 2.0,
        }
    assert {"command", "processor", "versions", "settings"} <= report["environment"].keys()
    assert report["environment"]["settings"]["dtype"] == "float32"
    page = tmp_path / "page.md"
    page.write_text("<!-- results: rules-toys -->\n<!-- end of results -->\n")
    rule_page.main([f"toys={path}", "--page", str(page)])
    assert "| guidance | " in page.read_text()
    assert (tmp_path / "performance" / "rules.png").is_file()
    with pytest.raises(SystemExit, match="other settings"):
        rule_speed.main([*arguments, "--prompt", "the river"])


def test_guidance_reads_one_model_after_two_system_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(ensemble, *_):
        seen.append([(member.engine.name, member.engine.prompts.system) for member in ensemble.members])
        raise ValueError("enough")

    monkeypatch.setattr(rule_speed, "measured", measured)
    rule_speed.main(["toy:1", "toy:2", "--rules", "max,guidance", "--system", "short", "--negative", "long"])
    assert seen == [[("toy:1", None), ("toy:2", None)], [("toy:1", "short"), ("toy:1", "long")]]
