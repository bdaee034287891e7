"""`mixlm generate`: what goes where, and where a prompt comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
from programs import MAIN, TOYS, Run, process


def completion(run: Run, *arguments: str) -> Any:
    """Return the completion to "hello" with seed 3, as JSON says it."""
    return json.loads(run("generate", "hello", *TOYS, "--seed", "3", "--json", *arguments).out)


@pytest.mark.slow
def test_only_the_text_goes_to_stdout(run: Run) -> None:
    report = completion(run)
    done = process("generate", "hello", *TOYS, "--seed", "3")
    assert done.code == 0
    assert done.out == report["text"] + "\n"
    assert done.err.count("\n") == 1
    shares = []
    for name, member in report["usage"]["members"].items():
        forwards = f"{member['forwards']} forward"
        shares.append(f"{name} {member['tokens'] / len(report['tokens']):.0%}, {forwards}")
    for part in (f"{len(report['tokens'])} tokens", "tokens/s", "bytes/s", *shares, "seed 3"):
        assert part in done.err


def test_the_same_seed_gives_the_same_text(run: Run) -> None:
    first, second, other = (run("generate", "hello", *TOYS, "--seed", seed).out for seed in ("5", "5", "6"))
    assert first == second != other


def test_without_a_seed_the_one_used_is_shown_and_gives_the_text_again(run: Run) -> None:
    first = run("generate", "hello", *TOYS)
    seed = first.err.split("seed ")[1].strip()
    assert run("generate", "hello", *TOYS, "--seed", seed).out == first.out


def test_json_is_one_object_and_nothing_else(run: Run) -> None:
    plain = run("generate", "hello", *TOYS, "--seed", "3")
    done = run("generate", "hello", *TOYS, "--seed", "3", "--json")
    report = json.loads(done.out)
    assert set(report) == {"text", "finish_reason", "seed", "tokens", "usage", "engines"}
    assert report["text"] + "\n" == plain.out
    assert report["seed"] == 3
    assert {token["member"] for token in report["tokens"]} == {"toy:1", "toy:2"}
    assert done.err == ""


def test_alternatives_go_into_the_json(run: Run) -> None:
    plain, top_logprobs, average = (
        completion(run, *more)
        for more in ((), ("--alternatives", "3"), ("--alternatives", "3", "--logprobs-of", "ensemble"))
    )
    assert plain["text"] == top_logprobs["text"] == average["text"]
    assert all(len(token["alternatives"]) == 3 for token in top_logprobs["tokens"] + average["tokens"])
    assert [token["logprob"] for token in top_logprobs["tokens"]] == [token["logprob"] for token in plain["tokens"]]
    assert [token["logprob"] for token in average["tokens"]] != [token["logprob"] for token in plain["tokens"]]
    assert "--json" in run("generate", "hello", *TOYS, "--alternatives", "3").error
    assert "logprobs_of" in run("generate", "hello", *TOYS, "--json", "--logprobs-of", "all").error


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_prompt_comes_from_standard_input(run: Run, arguments: tuple[str, ...]) -> None:
    by_argument = run("generate", "hello there", *TOYS, "--seed", "3")
    piped = run("generate", *arguments, *TOYS, "--seed", "3", stdin="hello there\n")
    assert (piped.code, piped.out) == (0, by_argument.out)


def test_raw_continues_the_text_as_it_stands(run: Run) -> None:
    def prompt_tokens(*arguments: str, stdin: str = "") -> int:
        report = json.loads(run("generate", *arguments, *TOYS, "--json", stdin=stdin).out)
        tokens: int = report["usage"]["members"]["toy:1"]["prompt_tokens"]
        return tokens

    assert prompt_tokens("ab") == 1 + len("user: ab\n")
    assert prompt_tokens("ab", "--raw") == 1 + len("ab")
    assert prompt_tokens("--raw", stdin="ab\n") == 1 + len("ab\n")


def test_options_reach_the_completion(run: Run) -> None:
    report = completion(run, "--max-tokens", "3")
    assert (len(report["tokens"]), report["finish_reason"]) == (3, "length")
    stopped = completion(run, "--stop", "no such word", "--stop", report["tokens"][2]["text"])
    assert stopped["text"] == report["text"].partition(report["tokens"][2]["text"])[0]
    assert stopped["finish_reason"] == "stop"
    alone = json.loads(run("generate", "x", *TOYS, "--method", "single", "-w", "0.3,0.7", "--json").out)
    assert {token["member"] for token in alone["tokens"]} <= {"toy:2"}
    greedy = [run("generate", "x", *TOYS, "--method", "greedy", "--seed", seed).out for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


def test_a_value_of_the_file_holds_unless_an_option_says_otherwise(run: Run, tmp_path: object) -> None:
    file = f"{tmp_path}/pair.toml"
    with open(file, "w") as out:
        out.write(
            'method = "single"\n[[members]]\nmodel = "toy:1"\nname = "one"\nweight = 1\n'
            '[[members]]\nmodel = "toy:2"\nweight = 0\n'
        )

    def writers(*arguments: str) -> set[str]:
        report = json.loads(run("generate", "x", "-e", file, "--seed", "1", "--json", *arguments).out)
        return {token["member"] for token in report["tokens"]}

    assert writers() == {"one"}
    assert writers("-w", "0,1") == {"toy:2"}
    assert writers("--method", "mixture", "-w", "1,1") == {"one", "toy:2"}


def test_notes_of_engines_are_shown_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm.engines import toy

    monkeypatch.setattr(toy, "toy_text", partial(toy.toy_text, notes=("this model is a table",)))
    assert run("generate", "x", *TOYS).err.count("note: this model is a table") == 1


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", MAIN, "generate", "x", *TOYS, "--seed", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    err = started.stderr.read()
    started.stderr.close()
    assert (started.wait(), err) == (141, b"")


@pytest.mark.slow
def test_a_narrow_encoding_does_not_end_a_completion() -> None:
    done = process("generate", "x", *TOYS, "--seed", "3", PYTHONIOENCODING="ascii")
    assert (done.code, done.out[:1]) == (0, " ")
    assert "\\xb7" in done.err


def test_piped_text_stands_before_the_prompt(run: Run) -> None:
    options = (*TOYS, "--seed", "3", "--max-tokens", "5")
    both = run("generate", "the question", *options, "--json", stdin="the text\n")
    assert json.loads(both.out)["text"] + "\n" == run("generate", "the text\n\nthe question", *options).out
    alone = run("generate", "the question", *options, "--json")
    tokens = [json.loads(done.out)["usage"]["members"]["toy:1"]["prompt_tokens"] for done in (both, alone)]
    assert tokens[0] > tokens[1]


@pytest.mark.slow
def test_a_pipe_that_is_left_open_is_explained() -> None:
    command = [sys.executable, "-c", MAIN, "generate", "hello", *TOYS, "--max-tokens", "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"reading standard input" in process.stderr.readline()
        assert process.communicate(b"")[0]
    assert process.returncode == 0


def test_batch_without_input_is_refused(run: Run) -> None:
    assert "--batch is given without --input" in run("generate", "hi", *TOYS, "--batch", "2").error
