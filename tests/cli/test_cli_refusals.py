"""Everything that can be wrong: one sentence, one hint, exit code 2, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import MAIN, TOYS, Run, process


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((*TOYS, "-w", "1"), ("1 weight (1) for 2 members", "one weight per member")),
        ((*TOYS, "-w", "1,2,3"), ("3 weights (1, 2, 3) for 2 members",)),
        ((*TOYS, "-w", "-1,2"), ("weights are -1, 2", "0 or more", "0.7,0.3")),
        ((*TOYS, "-w", "0,0"), ("weights are 0, 0", "greater than 0")),
        ((*TOYS, "-w", "nan,1"), ("weights are nan, 1", "finite")),
        ((*TOYS, "-w", "a,1"), ("--weights is 'a,1'", "numbers with commas", "-w 0.7,0.3")),
        ((*TOYS, "-w", ""), ("--weights is ''", "numbers with commas")),
        (("-m", "smollm2-135n"), ("no model 'smollm2-135n'", "did you mean 'smollm2-135m'?")),
        (("-m", "smollm2-135m"), ("not installed", "mixlm models get smollm2-135m")),
        ((), ("demo pair is not installed", "mixlm models get demo")),
        ((*TOYS, "-e", "file.toml"), ("--model and --ensemble are both given",)),
        ((*TOYS, "--temprature", "1"), ("no option --temprature", "did you mean --temperature?")),
        ((*TOYS, "--top-k"), ("'--top-k' requires an argument", "mixlm generate --help")),
        ((*TOYS, "--top-k", "x"), ("invalid value for '--top-k'", "integer")),
        ((*TOYS, "--top-p", "3"), ("top_p is 3.0", "at most 1")),
        ((*TOYS, "--temperature", "nan"), ("temperature is nan",)),
        ((*TOYS, "--temperature", "0"), ("temperature is 0", "use --method greedy")),
        ((*TOYS, "--mix-then-truncate", "--method", "mixture"), ("mean-then-truncate", "--method layered")),
        ((*TOYS, "--mix-then-truncate", "--rule", "max"), ("--rule max and --mix-then-truncate are both given",)),
        ((*TOYS, "--rule", "gacs"), ("rule is 'gacs'", "gac")),
        ((*TOYS, "--rule", "max", "--strength", "2"), ("strength is given, and rule max has no such parameter",)),
        ((*TOYS, "--rule", "contrastive", "--alpha", "2"), ("alpha is 2.0; for rule contrastive it must be",)),
        ((*TOYS, "--rule", "guidance", "--strength", "-1"), ("strength is -1.0; for rule guidance it must be",)),
        ((*TOYS, "--rule", "contrastive", "--unit", "piece"), ("rule contrastive divides", "--unit token")),
        (("-m", "toy:1", "--rule", "max"), ("rule max needs 2 members, and there is 1",)),
        (("-m", "toy:1", "-m", "toy:1", "--rule", "guidance"), ("both prompts of rule guidance are the same",)),
        ((*TOYS, "--rule", "proxy"), ("rule proxy combines 3 members (base, tuned, untuned), and there are 2",)),
        ((*TOYS, "--rule", "contrastive", "-w", "1,2"), ("weights are given, and rule contrastive",)),
        ((*TOYS, "--rule", "geometric", "--method", "single"), ("--rule geometric and --method single",)),
        ((*TOYS, "--attn", "sdpa"), ("--attn is given, and toy:1 runs in the engine toy",)),
        ((*TOYS, "--max-memory", "cpu=1GB"), ("--max-memory is given, and toy:1 runs in the engine toy",)),
        ((*TOYS, "--strength", "2"), ("--strength is given without a rule",)),
        ((*TOYS, "--method", "mixtur"), ("--method is 'mixtur'", "did you mean 'mixture'?")),
        ((*TOYS, "--unit", "sentence"), ("--unit is 'sentence'", "auto, token, piece")),
        ((*TOYS, "--dtype", "float8"), ("--dtype is 'float8'", "did you mean 'float")),
        ((*TOYS, "--graphs", "yes"), ("--graphs is 'yes'", "auto, on, off")),
        ((*TOYS, "--prefix-cache", "-1"), ("--prefix-cache is -1", "0 or more MiB")),
        ((*TOYS, "--prefix-cache", "5"), ("--prefix-cache is given, and no member runs in transformers",)),
        ((*TOYS, "--max-tokens", "0"), ("max_tokens is 0", "1 or more")),
        ((*TOYS, "--seed", "-1"), ("seed is -1", "0 or more")),
        ((*TOYS, "there"), ("extra argument", "in quotes")),
        ((*TOYS, "--raw", "--system", "be brief"), ("a raw prompt",)),
    ],
)
def test_options_that_do_not_fit(run: Run, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = run("generate", "hello", *arguments)
    assert done.code == 2
    for part in parts:
        assert part in done.error


def test_a_rule_beside_the_method_single_of_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "alone.toml"
    file.write_text('method = "single"\n[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n')
    done = run("generate", "hello", "-e", str(file), "--rule", "max")
    assert done.code == 2
    assert "--rule max and method = 'single' in" in done.error


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(run: Run, prompt: str) -> None:
    for done in (run("generate", prompt, *TOYS), run("generate", *TOYS, stdin=prompt), run("check", prompt, *TOYS)):
        assert done.code == 2
        assert "the prompt is empty" in done.error


def test_standard_input_that_is_not_utf8(run: Run) -> None:
    done = run("generate", *TOYS, stdin=b"caf\xe9")
    assert done.code == 2
    assert "byte 3 is 0xe9" in done.error


def test_no_standard_input_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.cli import main

    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", *TOYS]) == 2
    for reading in (["generate", "-"], ["score", "-"], ["fit", "-"], ["inspect", "--text", "-"]):
        assert main([*reading, *TOYS]) == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("method = ", ("is not valid TOML",)),
        ('[[members]]\nmodel = "toy:1"\nwait = 1', ("unknown key 'members.0.wait'", "did you mean 'weight'?")),
        ('methods = "mixture"\n[[members]]\nmodel = "toy:1"', ("unknown key 'methods'", "did you mean 'method'?")),
        ('method = "mixture"', ("members is missing", "[[members]]")),
        ('method = "x"\n[[members]]\nmodel = "toy:1"', ("method is 'x'",)),
        ('[[members]]\nmodel = "toy:1"\nweight = 1\n[[members]]\nmodel = "toy:2"', ("1 of 2 members have a weight",)),
    ],
)
def test_a_broken_ensemble_file(run: Run, tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "pair.toml").write_text(text)
    done = run("generate", "hello", "-e", str(tmp_path / "pair.toml"))
    assert done.code == 2
    for part in parts:
        assert part in done.error


def test_an_ensemble_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pair.toml").touch()
    done = run("generate", "hello", "-e", str(tmp_path / "par.toml"))
    assert done.code == 2
    assert "did you mean 'pair.toml'?" in done.error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("generat",), ("no command 'generat'", "did you mean 'generate'?")),
        (("Why is the sky blue?",), ("no command", "commands: generate, chat")),
        (("--versio",), ("no option --versio", "did you mean --version?")),
        (("models", "gett"), ("no command 'gett'", "did you mean 'get'?")),
        (("models", "get"), ("missing argument 'NAME'", "mixlm models get --help")),
        (("models", "get", "dem"), ("no model 'dem'", "did you mean 'demo'?")),
        (("check", *TOYS, "--samples", "5"), ("samples is 5",)),
        (("bench", *TOYS, "--prompt", ""), ("the prompt is empty",)),
        (("bench", *TOYS, "--json", "/no/such/folder/x.json"), ("there is no folder /no/such/folder",)),
        (("bench", *TOYS, "--json", "/"), ("it is a folder",)),
    ],
)
def test_commands_that_do_not_fit(run: Run, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    for part in parts:
        assert part in done.error


def test_a_refusal_comes_before_anything_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlm.loading.load_config", lambda *_, **__: pytest.fail("it was loaded"))
    for bad in (("-w", "1"), ("--temperature", "0"), ("--top-p", "0"), ("--rule", "proxy")):
        assert run("generate", "hello", *TOYS, *bad).code == 2


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (RuntimeError("boom\nand more"), 1, ("unexpected RuntimeError: boom\n", "run again with --debug")),
        (ValueError(), 1, ("unexpected ValueError\n",)),
        (OSError(28, "No space left on device"), 1, ("the system refused: No space left", "--debug")),
        (MemoryError(), 1, ("not enough memory", "smaller model")),
    ],
)
def test_the_unexpected(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, parts: tuple[str, ...]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mixlm.loading.load_config", load)
    done = run("generate", "hello", *TOYS)
    assert done.code == code
    for part in parts:
        assert part in done.error
    debugged = run("generate", "hello", *TOYS, "--debug")
    assert debugged.code == code
    assert debugged.err.startswith("Traceback")
    assert "Traceback" not in run("generate", *TOYS, "--", "--debug").err


def test_an_interruption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.generation.generation import Generation
    from mixlm.types import Token

    plain, seen = Generation.__next__, list[Token]()

    def interrupted(self: Generation) -> object:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(plain(self))
        return seen[-1]

    monkeypatch.setattr(Generation, "__next__", interrupted)
    done = run("generate", "hello", *TOYS, "--seed", "3")
    assert (done.code, done.err) == (130, "mixlm: interrupted\n")
    assert done.out == "".join(token.text for token in seen) + "\n"


def test_an_interruption_before_anything_is_imported() -> None:
    begin = """import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "mixlm.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from mixlm.__main__ import program
program()"""
    done = process("models", program=begin)
    assert (done.code, done.err) == (130, "mixlm: interrupted\n")


def test_control_characters_in_a_message_are_not_obeyed(run: Run) -> None:
    assert "\x1b" not in run("generate", "hello", "-m", "\x1b[31mred").error


@pytest.mark.slow
def test_a_program_ends_with_the_code_and_without_a_traceback() -> None:
    done = process("generate", "hello", *TOYS, "-w", "1")
    assert done.code == 2
    assert "2 members" in done.error


@pytest.mark.slow
def test_a_rule_is_layered_unless_another_method_is_given(run: Run) -> None:
    assert "the rule is gac" in run("generate", "x", *TOYS, "--rule", "gac", "--method", "auto").error
    for method in ((), ("--method", "conventional"), ("--method", "greedy")):
        assert run("generate", "x", *TOYS, *method, "--rule", "unite", "--max-tokens", "3").code == 0
    done = run("generate", "x", *TOYS, "--mix-then-truncate", "--max-tokens", "3")
    assert done.code == 0
    assert "--mix-then-truncate is now --rule mean-then-truncate" in done.err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("bench",), ("--method", "greedy")),
        (("bench",), ("--max-tokens", "5")),
        (("check",), ("--method", "greedy")),
        (("check",), ("--draft", "toy:1")),
        (("inspect",), ("--method", "greedy")),
        (("inspect",), ("--max-tokens", "5")),
        (("score", "text"), ("--seed", "1")),
        (("score", "text"), ("--top-k", "1")),
    ],
)
def test_options_without_effect_are_refused_and_not_in_help(
    run: Run, command: tuple[str, ...], option: tuple[str, ...]
) -> None:
    assert f"mixlm {command[0]} does not use {option[0]}: " in run(*command, *TOYS, *option).error
    assert f"{option[0]} " not in run(command[0], "--help").out


def test_block_needs_a_method_that_drafts(run: Run) -> None:
    assert "--block is given, and mixture does not draft" in run("generate", "hi", *TOYS, "--block", "2").error
    assert run("generate", "hi", *TOYS, "--block", "2", "--method", "auto", "--max-tokens", "2").code == 0


def test_an_ensemble_file_is_no_model(run: Run) -> None:
    assert "-m pair.toml names an ensemble file, not a model\nhint: use: -e pair.toml" in (
        run("generate", "hi", "-m", "pair.toml").error
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [("models",), ("--help",), ("--version",), ("generate", "--help"), ("inspect", "--no-measure", *TOYS),
     ("generate", "hi", *TOYS, "--max-tokens", "9"), ("nothing",)],
)  # fmt: skip
def test_a_pipe_that_is_closed_early_ends_every_command_alike(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", MAIN, *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    os.close(writer)
    assert done.returncode == 141
