"""`mixlm generate --input … --output …`: every prompt answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import MAIN, SLOW, TOYS, Run

from mixlm.resumable_log import exclusive

PROMPTS = [f"prompt number {i}" for i in range(12)]
OPTIONS = ("--max-tokens", "12", "--seed", "7")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS[:-1]]
    lines.append(json.dumps({"messages": [{"role": "user", "content": PROMPTS[-1]}]}))
    path.write_text("\n".join(lines) + "\n\n")
    return path


def arguments(prompts: Path, output: Path) -> list[str]:
    return ["generate", *TOYS, "--input", str(prompts), "--output", str(output), *OPTIONS]


def completions(path: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({item["number"] for item in lines}) == len(lines), "a prompt was answered twice"
    return {item["number"]: item["text"] for item in lines}


@pytest.mark.slow
def test_each_prompt_gets_the_completion_it_would_get_alone(run: Run, prompts: Path, tmp_path: Path) -> None:
    from mixlm import load

    done = run(*arguments(prompts, tmp_path / "out.jsonl"))
    assert (done.code, done.out) == (0, "")
    ensemble = load("toy:1", "toy:2")
    alone = [ensemble.generate(prompt, seed=7, sequence=i, max_tokens=12).text for i, prompt in enumerate(PROMPTS)]
    assert completions(tmp_path / "out.jsonl") == dict(enumerate(alone))
    for batch in ("1", "5"):
        run(*arguments(prompts, tmp_path / f"{batch}.jsonl"), "--batch", batch)
        assert completions(tmp_path / f"{batch}.jsonl") == dict(enumerate(alone))


def test_a_second_run_writes_nothing_again(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(*arguments(prompts, output))
    before = output.read_bytes()
    done = run(*arguments(prompts, output))
    assert done.code == 0
    assert f"12 of 12 are in {output}; nothing is left to generate" in done.err
    assert output.read_bytes() == before


@pytest.mark.slow
def test_a_rule_is_part_of_what_a_file_was_written_with(run: Run, prompts: Path, tmp_path: Path) -> None:
    command = arguments(prompts, tmp_path / "out.jsonl")
    assert run(*command, "--rule", "power", "--strength", "3").code == 0
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert record["run"]["rule"] == {"name": "power", "strength": 3.0}
    for other in ((), ("--rule", "power"), ("--rule", "max")):
        assert "is of another request, or was made with other settings" in run(*command, *other).error
    file = tmp_path / "pair.toml"
    command = ["generate", "-e", str(file), *command[command.index("--input") :]]
    command[command.index(str(tmp_path / "out.jsonl"))] = str(tmp_path / "file.jsonl")
    for top_k, code in ((3, 0), (3, 0), (4, 2)):
        file.write_text(f'[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n[sampling]\ntop_k = {top_k}\n')
        assert run(*command).code == code


@pytest.mark.slow
def test_a_killed_run_is_continued_with_nothing_lost_or_done_twice(run: Run, prompts: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(*arguments(prompts, whole))
    command = [sys.executable, "-c", SLOW + MAIN, *arguments(prompts, output), "--batch", "3"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
    data = output.read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    assert 2 <= data.count(b"\n") < 12
    # Killed while it wrote a line.
    output.write_bytes(data + b'{"number": 11, "key": "4f')
    done = run(*arguments(prompts, output))
    assert done.code == 0
    assert output.read_bytes().startswith(data)
    assert set(completions(output)) == set(range(12))
    missing = set(range(12)) - {json.loads(line)["number"] for line in data.splitlines()}
    assert {i: completions(output)[i] for i in missing} == {i: completions(whole)[i] for i in missing}


def test_without_a_seed_a_continued_run_keeps_that_of_the_first(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [*arguments(prompts, output)[:-2]]
    run(*command)
    first = output.read_text().splitlines()
    output.write_text("\n".join(first[:4]) + "\n")
    run(*command)
    assert sorted(output.read_text().splitlines()[4:]) != []
    assert completions(output) == {json.loads(line)["number"]: json.loads(line)["text"] for line in first}


def test_a_file_of_other_completions_is_refused_and_kept(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(*arguments(prompts, output))
    before = output.read_bytes()
    for change in (["--temperature", "0.9"], ["--method", "conventional"], ["-w", "0.9,0.1"]):
        done = run(*arguments(prompts, output), *change)
        assert done.code == 2
        assert "is of another request, or was made with other settings" in done.err
    output.write_text("something else\n")
    assert "line 1: expected a JSON object with number, key, seed" in run(*arguments(prompts, output)).err
    assert output.read_text() == "something else\n"
    output.write_bytes(before)


def test_other_keys_of_a_line_are_in_its_output(run: Run, tmp_path: Path) -> None:
    path, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"id": "a7", "prompt": "one", "label": [1]}\n{"prompt": "two"}\n')
    assert run(*arguments(path, output)).code == 0
    lines = {line["number"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert (lines[0]["id"], lines[0]["label"]) == ("a7", [1])
    assert "id" not in lines[1]
    assert lines[0]["run"]["engines"] == {"toy:1": "toy", "toy:2": "toy"}
    assert lines[0]["run"]["options"] == {"max_tokens": 12}
    assert set(lines[0]["run"]) == {"mixlm", "engines", "weights", "method", "unit", "options"}
    path.write_text(path.read_text().replace("a7", "a8"))
    assert "number 0 is of another request" in run(*arguments(path, output)).err


def test_output_may_be_standard_output(run: Run, prompts: Path, tmp_path: Path) -> None:
    run(*arguments(prompts, tmp_path / "out.jsonl"))
    done = run(*arguments(prompts, Path("-")))
    assert done.code == 0
    shown = {item["number"]: item["text"] for item in map(json.loads, done.out.splitlines())}
    assert shown == completions(tmp_path / "out.jsonl")
    assert not Path("-").exists()


def test_another_seed_is_refused_and_the_same_one_is_not(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(*arguments(prompts, output))
    assert "was written with seed 7, and --seed is 8" in run(*arguments(prompts, output), "--seed", "8").err
    assert run(*arguments(prompts, output)).code == 0


def test_a_file_that_another_process_writes_is_refused(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with exclusive(output):
        assert "out.jsonl is being written by another mixlm" in run(*arguments(prompts, output)).err
    assert run(*arguments(prompts, output)).code == 0


def test_a_prompt_that_cannot_be_answered_is_named_and_the_others_are(run: Run, prompts: Path, tmp_path: Path) -> None:
    long = json.dumps({"prompt": "far too long " * 2000})
    prompts.write_text(prompts.read_text().strip() + "\n" + long + "\n")
    output = tmp_path / "out.jsonl"
    done = run(*arguments(prompts, output))
    assert done.code == 1
    assert "prompt 13: the prompt has" in done.err
    assert set(completions(output)) == set(range(12))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nothing", "line 2: not valid JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"prompt": "a", "messages": []}', "line 2: it needs either"),
        ('{"prompt": 3}', 'line 2: "prompt" is empty or not a string'),
        ('{"messages": "a"}', 'line 2: "messages" is not a list'),
        ('{"prompt": "a", "temperature": 0.5}', "line 2: 'temperature' is an option"),
        ('{"prompt": "a", "seed": 1}', "line 2: 'seed' is an option"),
        ('{"prompt": "a", "weights": [1, 0]}', "line 2: 'weights' is an option"),
        ('{"prompt": "a", "Top-K": 1}', "line 2: 'Top-K' is an option"),
        ('{"prompt": "a", "model": "toy:2"}', "line 2: 'model' is an option"),
        ('{"prompt": "a", "options": {"temperature": 0}}', "line 2: 'options' is an option"),
        ('{"prompt": "a", "max_new_tokens": 2}', "line 2: 'max_new_tokens' is an option"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: not valid JSON: it has the key 'prompt' twice"),
        ('{"prompt": "a", "score": NaN}', "line 2: not valid JSON: Out of range float values"),
        ('{"prompt": "a", "score": 1e999}', "line 2: not valid JSON: Out of range float values"),
        ('{"prompt": "a", "text": "b"}', "line 2: 'text' is a key of the output"),
        ('{"promt": "a"}', "line 2: it needs either"),
        ('{"text": "a"}', "line 2: it needs either"),
    ],
)
def test_a_line_in_a_wrong_form_is_named(run: Run, tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    done = run(*arguments(path, tmp_path / "out.jsonl"))
    assert done.code == 2
    assert f"{path}, {reason}" in done.error
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_file_of_prompts_says_what_it_has_to_have(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n")
    error = run(*arguments(path, tmp_path / "out.jsonl")).error
    assert f"{path} is empty" in error
    assert 'hint: each line must be an object {"prompt"' in error


def test_the_output_is_a_file_that_can_be_continued(run: Run, prompts: Path) -> None:
    assert (
        "is no file that can be continued\nhint: --output - is standard output"
        in run(*arguments(prompts, Path("/dev/null"))).error
    )


def test_a_prompt_that_fails_is_reported_in_the_words_of_the_command_line(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixlm import Ensemble
    from mixlm.errors import MemoryLimitError

    def refuse(*_: object) -> None:
        raise MemoryLimitError("too little memory", "use --dtype bfloat16")

    monkeypatch.setattr(Ensemble, "encode_prompt", refuse)
    done = run(*arguments(prompts, tmp_path / "out.jsonl"))
    assert "prompt 1: too little memory (use --dtype bfloat16)\n" in done.err


def test_what_does_not_go_together_is_refused(run: Run, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for changes, reason in (
        (["--input", str(prompts)], "--input and --output go together"),
        (["--output", str(output)], "--input and --output go together"),
        (["--input", str(prompts), "--output", str(prompts)], "are both"),
        (["--input", str(prompts), "--output", str(output), "--json"], "takes no --json"),
        (["hello", "--input", str(prompts), "--output", str(output)], "takes no prompt"),
        (["--input", str(prompts), "--output", str(output), "--batch", "0"], "--batch is 0"),
        (["--input", str(prompts), "--output", str(tmp_path / "no" / "x")], "there is no folder"),
    ):
        assert reason in run("generate", *TOYS, *changes).error
    assert not output.exists()
    assert os.listdir(tmp_path) == ["prompts.jsonl"]
