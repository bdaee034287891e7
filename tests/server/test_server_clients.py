"""Third-party clients against `mixlm serve`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import warnings
from typing import Literal

import openai
import pydantic
import pytest
from serving import HELLO, endless, running

from mixlm.binding import LoadedMember
from mixlm.ensemble import Ensemble
from mixlm.loading import load
from mixlm.server.api_keys import hash_key

PAIR = load("toy:1", "toy:2")


@pytest.fixture
def sdk(toys):
    with openai.OpenAI(base_url=toys.url + "/v1", api_key="any") as client:
        yield client


@pytest.mark.slow
def test_openai_sdk(sdk):
    assert [model.id for model in sdk.models.list()] == ["toys"]
    completion = sdk.chat.completions.create(
        model="toys", messages=HELLO, seed=1, max_completion_tokens=9, logprobs=True, extra_body={"mixlm": {"top_k": 5}}
    )
    expected = PAIR.generate(HELLO, seed=1, max_tokens=9, top_k=5)
    assert completion.choices[0].message.content == expected.text
    assert completion.choices[0].mixlm["members"] == [token.member for token in expected.tokens]
    assert completion.usage.completion_tokens == len(expected.tokens)
    assert len(completion.choices[0].logprobs.content) == len(expected.tokens)
    text = sdk.completions.create(model="toys", prompt=["one", "two"], seed=1, max_tokens=4)
    assert [choice.text for choice in text.choices] == [
        PAIR.generate(prompt, seed=1, sequence=i, max_tokens=4, raw=True).text
        for i, prompt in enumerate(["one", "two"])
    ]


def test_openai_sdk_reads_top_logprobs(sdk):
    completion = sdk.chat.completions.create(
        model="toys", messages=HELLO, seed=1, max_tokens=5, logprobs=True, top_logprobs=2
    )
    expected = PAIR.generate(HELLO, seed=1, max_tokens=5, top_logprobs=2)
    for entry, token in zip(completion.choices[0].logprobs.content, expected.tokens, strict=True):
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [top.data for top in token.top_logprobs]
    text = sdk.completions.create(model="toys", prompt="one", seed=1, max_tokens=5, logprobs=2)
    expected = PAIR.generate("one", seed=1, max_tokens=5, top_logprobs=2, raw=True)
    for by_text, token in zip(text.choices[0].logprobs.top_logprobs, expected.tokens, strict=True):
        assert by_text[token.text] == pytest.approx(token.logprob)


@pytest.mark.slow
def test_openai_sdk_parses_structured_output(sdk):
    class Thing(pydantic.BaseModel):
        kind: Literal["river", "bird"]
        large: bool
        parts: list[Literal["stone", "light"]] = pydantic.Field(max_length=2)

    for seed in range(5):
        completion = sdk.chat.completions.parse(
            model="toys", messages=HELLO, seed=seed, response_format=Thing, max_tokens=400
        )
        assert isinstance(completion.choices[0].message.parsed, Thing)
    [text] = [
        message.choices[0].message.content
        for message in [
            sdk.chat.completions.create(
                model="toys", messages=HELLO, seed=1, max_tokens=60, response_format={"type": "json_object"}
            )
        ]
    ]
    assert text.startswith("{")


def test_openai_sdk_continues_a_conversation(sdk):
    first = sdk.chat.completions.create(model="toys", messages=HELLO, seed=1, max_tokens=5).choices[0].message
    again = sdk.chat.completions.create(model="toys", messages=[*HELLO, first, *HELLO], seed=1, max_tokens=5)
    assert again.choices[0].message.content


def test_openai_sdk_streams(sdk):
    expected = PAIR.generate(HELLO, seed=2, max_tokens=9)
    chunks = list(
        sdk.chat.completions.create(
            model="toys", messages=HELLO, seed=2, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    whole = PAIR.generate(HELLO, seed=2, max_tokens=500)
    assert whole.finish_reason == "stop"
    with sdk.chat.completions.stream(model="toys", messages=HELLO, seed=2, max_tokens=500) as stream:
        assert stream.get_final_completion().choices[0].message.content == whole.text
    text = sdk.completions.create(model="toys", prompt="one", seed=2, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == PAIR.generate("one", seed=2, max_tokens=9, raw=True).text


@pytest.mark.slow
def test_openai_sdk_asynchronously(toys):
    async def stream_text(client, seed):
        stream = await client.chat.completions.create(
            model="toys", messages=HELLO, seed=seed, max_tokens=9, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run():
        async with openai.AsyncOpenAI(base_url=toys.url + "/v1", api_key="any") as client:
            return await asyncio.gather(*[stream_text(client, seed) for seed in range(20)])

    assert asyncio.run(run()) == [PAIR.generate(HELLO, seed=seed, max_tokens=9).text for seed in range(20)]


@pytest.mark.slow
def test_openai_sdk_understands_errors(sdk, toys):
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(
            model="toys", messages=HELLO, tools=[{"type": "function", "function": {"name": "a b"}}]
        )
    assert refused.value.param == "tools.0.function.name"
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="none", messages=HELLO)
    with running(endless(0.01), {hash_key("a-long-and-random-key"): "ada"}, request_timeout=0.3) as guarded:
        client = openai.OpenAI(base_url=guarded.url + "/v1", api_key="a-long-and-random-key", max_retries=0)
        with client, pytest.raises(openai.APIError, match="took longer"):
            list(client.chat.completions.create(model="toys", messages=HELLO, max_tokens=3000, stream=True))
        with (
            openai.OpenAI(base_url=guarded.url + "/v1", api_key="no") as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()


@pytest.mark.slow
def test_openai_sdk_retries_when_the_queue_is_full():
    with running(endless(0.01), max_batch=1, max_queue=0) as server:

        async def run():
            async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any", max_retries=8) as client:
                requests = [
                    client.chat.completions.create(model="toys", messages=HELLO, max_tokens=20) for _ in range(3)
                ]
                return await asyncio.gather(*requests)

        assert [completion.usage.completion_tokens for completion in asyncio.run(run())] == [20, 20, 20]
        assert server.metric("mixlm_errors_total", status="429") >= 2


def test_curl(toys):
    command = [
        "curl",
        "-sS",
        "-N",
        "--noproxy",
        "*",
        toys.url + "/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
    ]
    body = {"messages": HELLO, "seed": 1, "max_tokens": 5}
    done = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, check=True, timeout=30)
    assert (
        json.loads(done.stdout)["choices"][0]["message"]["content"] == PAIR.generate(HELLO, seed=1, max_tokens=5).text
    )
    done = subprocess.run(
        [*command, json.dumps({**body, "stream": True})], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_evaluation_harness(toys, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        pytest.importorskip("lm_eval")
        from lm_eval.api.instance import Instance
        from lm_eval.api.registry import get_model

        path = "/v1/completions" if kind == "local-completions" else "/v1/chat/completions"
        model = get_model(kind)(
            model="toys", base_url=toys.url + path, tokenizer_backend=None, tokenized_requests=False, num_concurrent=1
        )
        prompts = ["one river", "two stones"]
        options = [({"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0}) for _ in prompts]
        inputs = prompts
        if kind == "local-chat-completions":
            from lm_eval.models.api_models import JsonChatStr

            inputs = [JsonChatStr(json.dumps([{"role": "user", "content": prompt}])) for prompt in prompts]
        instances = [
            Instance("generate_until", {}, (prompt, limits), i)
            for i, (prompt, limits) in enumerate(zip(inputs, options, strict=True))
        ]
        texts = model.generate_until(instances, disable_tqdm=True)
    raw = kind == "local-completions"
    assert texts == [PAIR.generate(prompt, method="greedy", max_tokens=6, raw=raw).text for prompt in prompts]


@pytest.mark.slow
def test_lm_evaluation_harness_scores_answers(tmp_path):
    """A multiple-choice task has the same scores over HTTP as in this process."""
    from speaking import speaking
    from trained import trained
    from transformers import PreTrainedTokenizerFast

    ensemble = Ensemble([LoadedMember(speaking("gpt2", i), f"m{i}") for i in range(2)], [0.7, 0.3])
    PreTrainedTokenizerFast(tokenizer_object=trained("gpt2")).save_pretrained(tmp_path / "tokenizer")
    places = ["the old river", "under the stone bridge", "it's 2024", "señor café", "over the birds"]
    rows = [{"question": f"Where is {name}?\nAnswer:", "index": i % 3} for i, name in enumerate(places)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "places", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_choice": [" the bridge", " birds under it", " 3 books"],
        "doc_to_target": "index", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        pytest.importorskip("lm_eval")
        from lm_eval import simple_evaluate
        from lm_eval.api.registry import get_model
        from lm_eval.tasks import TaskManager

        from mixlm.evaluation.lm import EnsembleLM

        def scores(model):
            manager = TaskManager(include_defaults=False)
            done = simple_evaluate(
                model=model, tasks=[dict(task)], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
            )
            return [place["filtered_resps"] for place in done["samples"]["places"]], done["results"]["places"][
                "acc,none"
            ]

        expected, accuracy = scores(EnsembleLM(ensemble))
        with running(ensemble) as server:
            client = get_model("local-completions")(
                model="toys", base_url=server.url + "/v1/completions", tokenizer=str(tmp_path / "tokenizer"),
                tokenizer_backend="huggingface", tokenized_requests=False, batch_size=4,
            )  # fmt: skip
            served, served_accuracy = scores(client)
    assert served_accuracy == accuracy
    assert len(served) == len(expected) == len(rows)
    for expected_scores, served_scores in zip(expected, served, strict=True):
        for (logprob, greedy), (sent, sent_greedy) in zip(expected_scores, served_scores, strict=True):
            assert sent == pytest.approx(logprob, abs=1e-4)
            assert sent_greedy == greedy


@pytest.mark.slow
def test_litellm(toys):
    """In a process of its own, because litellm changes global state."""
    pytest.importorskip("litellm")
    code = (
        "import litellm, sys\n"
        "request = dict(model='openai/toys', api_base=sys.argv[1], api_key='any', seed=1, max_tokens=6,\n"
        "           messages=[{'role': 'user', 'content': 'hello'}])\n"
        "print(litellm.completion(**request).choices[0].message.content)\n"
        "print(''.join(one.choices[0].delta.content or '' for one in litellm.completion(**request, stream=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, toys.url + "/v1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [PAIR.generate(HELLO, seed=1, max_tokens=6).text] * 2
