"""Measures how long a long prompt holds up other generations, with and without prefill in chunks.

python -m research.scripts.prefill_gaps [-m MODEL ...] [--streams N] [--prompt TOKENS ...] [--chunk TOKENS ...]

N generations run; after some tokens of each, one with a long prompt is added. The gap of a generation is the time from
one of its tokens to the next. Each run prints the median and the longest gap before the prompt came, and both while its
members prefilled it. TOKENS is the most that one step prefills; the scheduler takes fewer where they take long. 0 is
prefill in one step. Chunk sizes take turns, so that the load of a shared machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time

from mixlm.config import parse_config
from mixlm.ensemble import Ensemble
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.loading import load_config

WORDS = "The river runs past the old mill, and the birds sing in the trees above it. "


def long_prompt(ensemble: Ensemble, tokens: int) -> str:
    """Return a text that has about so many tokens for the member with the most."""
    settings = ensemble.settings(raw=True)
    longest = max(len(ids) for ids in ensemble.encode_prompt(WORDS * 40, settings).ids)
    return WORDS * round(40 * tokens / longest)


def measure(ensemble: Ensemble, streams: int, prompt: str, chunk: int, usual_tokens: int) -> str:
    """Run the streams, add the prompt, and return a line of figures."""
    scheduler = Scheduler(streams + 1, chunk or None)

    def start(text: str, number: int) -> Generation:
        settings = ensemble.settings(raw=True, seed=number, max_tokens=3000, ignore_end=True)
        generation = ensemble.context(settings).start(ensemble.encode_prompt(text, settings))
        scheduler.add(generation)
        return generation

    others = [start("Tell me about birds.", number) for number in range(streams)]
    last_times: dict[Generation, float] = {}
    gaps: list[float] = []

    def step() -> None:
        advanced = scheduler.step()
        now = time.perf_counter()
        for generation in advanced:
            if generation.ready and generation is not late:
                generation.ready.clear()
                if generation in last_times:
                    gaps.append(now - last_times[generation])
                last_times[generation] = now

    late: Generation | None = None
    while min(len(generation.completion.tokens) for generation in others) < usual_tokens:
        step()
    usual_gaps = gaps[len(gaps) // 2 :]
    usual, longest_usual, begin = statistics.median(usual_gaps), max(usual_gaps), time.perf_counter()
    gaps.clear()
    late = start(prompt, streams)
    lengths = [len(ids) for ids in ensemble.encode_prompt(prompt, ensemble.settings(raw=True)).ids]
    while any(session.num_cached < length for session, length in zip(late.sessions, lengths, strict=True)):
        step()
    seconds = time.perf_counter() - begin
    # Those that still wait have a gap too.
    gaps += [time.perf_counter() - last for generation, last in last_times.items() if not generation.finished]
    for generation in [*others, late]:
        scheduler.cancel(generation)
    tokens = max(member.prompt_tokens for member in late.completion.usage.members.values())
    return (
        f"prompt {tokens}, chunk {chunk}: usual gap {usual:.2f} s, longest {longest_usual:.2f} s; "
        f"with the prompt: median {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s = "
        f"{max(gaps) / usual:.1f} times the usual; all prefilled after {seconds:.1f} s"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="models", action="append")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, nargs="+", default=[2000, 7000])
    parser.add_argument("--chunk", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    members = [{"model": model} for model in arguments.models or ("smollm2-135m", "gemma-3-270m")]
    ensemble = load_config(parse_config({"members": members}, "load"), sequences=arguments.streams + 1)
    for _ in range(arguments.repeats):
        for tokens in arguments.prompt:
            prompt = long_prompt(ensemble, tokens)
            for chunk in arguments.chunk:
                print(measure(ensemble, arguments.streams, prompt, chunk, 12), flush=True)


if __name__ == "__main__":
    main()
