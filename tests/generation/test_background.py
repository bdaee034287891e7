"""The async face: what `generate` returns, batched, streamed, cancelled."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest

from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import MixlmError
from mixlm.generation.background import BackgroundRunner, _Channel

OPTIONS = {"seed": 5, "max_tokens": 8, "ignore_end": True}


@pytest.fixture
def pair() -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=seed, name=f"toy{seed}"), f"toy{seed}") for seed in (1, 2)])


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    for thread in threading.enumerate():
        if thread.name == "mixlm generations":
            thread.join(30)
            assert not thread.is_alive()


def run(coroutine):
    async def in_time():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(in_time())


def test_it_returns_what_generate_returns(pair):
    assert run(pair.agenerate("the river", **OPTIONS)).text == pair.generate("the river", **OPTIONS).text
    prompts = ["the river", "one bird", "two stones"]
    completions = run(pair.agenerate(prompts, **OPTIONS))
    assert [completion.text for completion in completions] == [c.text for c in pair.generate(prompts, **OPTIONS)]


def test_tokens_come_one_by_one_and_the_event_loop_goes_on(pair):
    """Each forward pass waits for the event loop, which so has to go on meanwhile."""
    ticked, waited = threading.Event(), []
    for member in pair.members:
        respond = member.engine.respond

        def after_a_tick(requests, respond=respond):
            ticked.clear()
            waited.append(ticked.wait(30))
            return respond(requests)

        member.engine.respond = after_a_tick

    async def read() -> tuple[list[str], str]:
        async def tick() -> None:
            while True:
                ticked.set()
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        generation = pair.astream("the river", **OPTIONS)
        texts = [token.text async for token in generation]
        ticking.cancel()
        return texts, generation.completion.text

    texts, text = run(read())
    assert len(waited) >= 8
    assert all(waited)
    for member in pair.members:
        del member.engine.respond
    assert "".join(texts) == text == pair.generate("the river", **OPTIONS).text
    assert len(texts) == 8


def test_calls_in_progress_are_batched(pair):
    """Every call waits for its first forward pass until all have arrived; then engines get several requests at once."""
    arrived, batches = threading.Event(), []
    for member in pair.members:
        respond = member.engine.respond

        def counted(requests, respond=respond):
            arrived.wait(30)
            batches.append(len(requests))
            return respond(requests)

        member.engine.respond = counted

    async def several() -> list[str]:
        tasks = [asyncio.create_task(pair.agenerate(f"{n} birds", **OPTIONS)) for n in range(6)]
        await asyncio.sleep(0)
        arrived.set()
        return [completion.text for completion in await asyncio.gather(*tasks)]

    texts = run(several())
    assert max(batches) > 1
    assert texts == [pair.generate(f"{n} birds", **OPTIONS).text for n in range(6)]


@pytest.mark.parametrize("how", ["aclose", "async with", "cancel", "forget"])
def test_an_ended_generation_stops_running(pair, how):
    async def begin() -> str:
        generation = pair.astream("the river", seed=1, max_tokens=4000, ignore_end=True)
        first = (await anext(generation)).text
        if how == "aclose":
            await generation.aclose()
            assert generation.completion.text.startswith(first)
            assert [token async for token in generation] == []
        elif how == "async with":
            async with generation:
                pass
        elif how == "cancel":
            task = asyncio.create_task(generation.finish())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            del generation
            gc.collect()
        return first

    steps = []
    pair.members[0].engine.on_forward = lambda ids, last: steps.append(len(ids))
    assert run(begin())
    # The thread ends (see `no_thread_is_left`) long before 4000 tokens are written.
    for thread in threading.enumerate():
        if thread.name == "mixlm generations":
            thread.join(30)
    assert len(steps) < 3000


def test_errors_arrive(pair):
    with pytest.raises(MixlmError, match="max_tokens"):
        run(pair.agenerate("x", max_tokens=-1))
    pair.members[0].engine.context_length = pair.members[1].engine.context_length = 3
    with pytest.raises(MixlmError, match="context"):
        run(pair.agenerate("the river " * 20, **OPTIONS))
    with pytest.raises(RuntimeError, match="has not begun"):
        pair.astream("x").completion  # noqa: B018


def test_a_failing_member_ends_its_generation_and_the_next_one_works(pair):
    def fails(ids: np.ndarray, last: int) -> None:
        raise ValueError("broken")

    for member in pair.members:
        member.engine.on_forward = fails
    with pytest.raises(MixlmError, match="broken"):
        run(pair.agenerate(["the river", "a bird"], **OPTIONS))
    for member in pair.members:
        member.engine.on_forward = None
    assert run(pair.agenerate("the river", **OPTIONS)).text


def test_a_generation_may_be_collected_where_the_lock_is_held():
    runner = BackgroundRunner(1)

    def collected() -> None:
        with runner._lock:
            runner.cancel(_Channel(lambda: None))

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
