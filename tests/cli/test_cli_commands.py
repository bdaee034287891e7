"""The other commands: chat from a pipe, models, check, bench, help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import TOYS, Run, process

COMMANDS = ((), ("generate",), ("chat",), ("models",), ("models", "get"), ("check",), ("bench",), ("inspect",))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert "Usage: mixlm" in done.out


def test_help_shows_the_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.core.options import GenerationOptions
    from mixlm.types import Sampling

    monkeypatch.setenv("COLUMNS", "200")
    text = run("generate", "--help").out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│ --")}
    assert f"Default: {Sampling().temperature}." in lines["--temperature"]
    assert f"Default: {Sampling().top_k}." in lines["--top-k"]
    assert f"Default: {GenerationOptions().max_tokens}." in lines["--max-tokens"]


def test_nothing_at_all_shows_the_help(run: Run) -> None:
    assert run().out == run("--help").out


def test_version(run: Run) -> None:
    from mixlm import __version__

    assert run("--version").out == f"mixlm {__version__}\n"


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    heavy = ("torch", "transformers", "scipy", "rich", "mixlm.ensemble", "mixlm.models")
    code = f"import mixlm.cli\nprint([name for name in {heavy} if name in sys.modules])"
    assert process(program=f"import sys\n{code}").out == "[]\n"


def test_chat_from_a_pipe(run: Run) -> None:
    both = run("chat", *TOYS, "--seed", "3", stdin="hello\n\nagain\n")
    assert both.code == 0
    first, second = both.out.splitlines()
    alone = run("chat", *TOYS, "--seed", "3", stdin="hello")
    assert alone.out == first + "\n"
    assert both.err.count("tokens/s") == 2
    assert first != second


def test_reset_begins_a_new_conversation(run: Run) -> None:
    done = run("chat", *TOYS, "--seed", "3", stdin="hello\n/reset\nhello\n/exit\nhello\n")
    first, second = done.out.splitlines()
    assert first == second
    assert "a new conversation" in done.err


def test_chat_commands_are_not_messages(run: Run) -> None:
    done = run("chat", *TOYS, stdin="/help\n/rest\n/exit\n")
    assert done.out == ""
    assert "/reset   begin a new conversation" in done.err
    assert "there is no command /rest; did you mean '/reset'" in done.err
    assert run("chat", *TOYS, stdin="/usr/bin is what?\n").out != ""


def test_chat_as_json_is_one_object_a_line(run: Run) -> None:
    lines = run("chat", *TOYS, "--json", stdin="hello\nagain\n").out.splitlines()
    prompts = [json.loads(line)["usage"]["members"]["toy:1"]["prompt_tokens"] for line in lines]
    assert len(prompts) == 2
    assert prompts[0] < prompts[1]


def test_a_refused_message_ends_a_piped_chat(run: Run) -> None:
    done = run("chat", *TOYS, stdin="x" * 9000)
    assert done.code == 2
    assert "whose context holds 4096" in done.error


def test_models_lists_the_catalogue(run: Run) -> None:
    done = run("models")
    assert done.code == 0
    for part in ("smollm2-135m", "gemma-3-270m", "98 MB", "Apache-2.0", "Gemma Terms of Use", "mixlm models get"):
        assert part in done.out
    rows = json.loads(run("models", "--json").out)["models"]
    assert [one["name"] for one in rows] == ["smollm2-135m", "gemma-3-270m"]
    assert [one["installed"] for one in rows] == [False, False]


def test_models_lists_what_is_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.models import InstalledModel

    one = InstalledModel("own-abc", Path("/models/own-abc"), "/files/[own].gguf", 5_000_000, "bfloat16", None)
    monkeypatch.setattr("mixlm.models.installed", lambda: [one])
    assert "/files/[own].gguf" in run("models").out
    row = json.loads(run("models", "--json").out)["models"][-1]
    assert (row["name"], row["path"], row["size_bytes"]) == ("own-abc", "/models/own-abc", 5_000_000)


def test_models_get(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.models import InstalledModel

    def get(name: str) -> list[InstalledModel]:
        return [InstalledModel(name, Path("/models") / name, "catalog", 1, "bfloat16", None)]

    monkeypatch.setattr("mixlm.models.get", get)
    assert run("models", "get", "smollm2-135m").out == "smollm2-135m is installed: /models/smollm2-135m\n"


def _report(equal: bool) -> Any:
    from mixlm.verification.check import Comparison, Report

    return Report((Comparison("mixture", "exact", "token", 1, 500, 9.5, 0.3, 0.02, float("inf"), equal=equal),))


@pytest.mark.parametrize("equal", [True, False])
def test_check_says_what_was_found(run: Run, monkeypatch: pytest.MonkeyPatch, equal: bool) -> None:
    asked: dict[str, Any] = {}

    def compare(ensemble: Any, prompt: str, **given: Any) -> Any:
        asked.update(given, prompt=prompt, names=ensemble.names)
        return _report(equal)

    monkeypatch.setattr("mixlm.verification.check.check", compare)
    done = run("check", "Hello?", *TOYS, "--samples", "500", "--top-k", "5", "--seed", "1")
    assert done.code == (0 if equal else 1)
    assert ("equal" if equal else "different") in done.out
    assert ("No difference" if equal else "do not sample one law") in done.out
    assert (asked["samples"], asked["prompt"], asked["names"]) == (500, "Hello?", ("toy:1", "toy:2"))
    assert asked["options"] == {"top_k": 5, "seed": 1}
    found = json.loads(run("check", *TOYS, "--json").out)
    assert found["equal"] is equal
    assert found["comparisons"][0]["expected_total_variation"] is None


def test_check_loads_in_float32_unless_told_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mixlm.loading import load_config

    seen: list[list[str]] = []

    def load(config: Any, **given: Any) -> Any:
        seen.append([f"{one.dtype} {one.device}" for one in config.members])
        return load_config(config, **given)

    monkeypatch.setattr("mixlm.loading.load_config", load)
    monkeypatch.setattr("mixlm.verification.check.check", lambda *_, **__: _report(True))
    file = tmp_path / "pair.toml"
    file.write_text('[[members]]\nmodel = "toy:1"\ndtype = "float16"\n[[members]]\nmodel = "toy:2"\ndevice = "cuda"\n')
    run("check", *TOYS)
    run("check", *TOYS, "--dtype", "bfloat16")
    run("check", "-e", str(file))
    run("check", "-e", str(file), "--dtype", "bfloat16", "--device", "cpu")
    run("generate", "x", *TOYS)
    assert seen == [
        ["float32 auto", "float32 auto"],
        ["bfloat16 auto", "bfloat16 auto"],
        ["float16 auto", "float32 cuda"],
        ["bfloat16 cpu", "bfloat16 cpu"],
        ["auto auto", "auto auto"],
    ]


def test_check_of_every_unit_is_one_table(run: Run) -> None:
    done = run("check", *TOYS, "--every-unit", "--samples", "200")
    assert done.code == 0
    assert "units token, piece, word, byte" in done.out
    assert "--every-unit and --unit are both given" in run("check", *TOYS, "--every-unit", "--unit", "word").error


def test_check_and_bench_on_toys(run: Run, tmp_path: Path) -> None:
    assert run("check", *TOYS, "--samples", "200", "--seed", "0").code == 0
    file = tmp_path / "speed.json"
    done = run("bench", *TOYS, "--tokens", "8", "--repeats", "1", "--json", str(file))
    assert done.code == 0
    for part in ("single toy:1", "conventional", "mixture", "8 + 8", "mixture/conventional"):
        assert part in done.out
    found = json.loads(file.read_text())
    assert set(found) == {"runs", "ratios", "environment"}
    assert str(file) in done.err


def test_bench_can_print_json_alone(run: Run) -> None:
    done = run("bench", *TOYS, "--tokens", "8", "--repeats", "1", "--json", "-", "--prompt", "Hello?")
    assert json.loads(done.out)["environment"]["settings"]["prompt"] == "Hello?"
    assert done.err == ""
