"""An ensemble as a model of the harness: probabilities against brute force, options, templates, noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from scored_texts import speaking, stepwise
from small_tasks import OTHER_TOKENS, toys
from toys import END, SHARED

from mixlm.binding import LoadedMember
from mixlm.engines.toy import WORD_TOKENS, ToyEngine, random_table, wordy_table
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.evaluation.contexts import generation_options, is_greedy, pack, unpack
from mixlm.evaluation.lm import EnsembleLM
from mixlm.generation.generation import Generation, GenerationContext
from mixlm.generation.prompt import EncodedPrompt
from mixlm.routing import FixedRouter, FunctionRouter, LearnedRouter, PromptRouter, Router
from mixlm.routing.features import FEATURES
from mixlm.scoring.score import score
from mixlm.scoring.scores import router_weights
from mixlm.types import Message

LETTERS = (b"a", b"b", b"c")


@dataclass
class Request:
    args: tuple[Any, ...]
    doc_id: int = 0
    resps: list[Any] = field(default_factory=list)


def probabilities(engine: ToyEngine, ids: list[int]) -> np.ndarray:
    logits = np.asarray(engine.table(tuple(ids)), dtype=np.float32).astype(np.float64)
    mass = np.exp(logits - logits.max())
    return mass / mass.sum()


def test_loglikelihood_by_token_equals_brute_force() -> None:
    ensemble = toys()
    context, continuation = "the river", " turns under\nit"
    engines = [member.engine for member in ensemble.members]
    before = engines[0].prompts.raw(context).tolist()
    ids = engines[0].encoder.encode(continuation.encode()).ids
    expected = 0.0
    for i, token in enumerate(ids):
        rows = [probabilities(engine, before + ids[:i]) for engine in engines]
        expected += np.log(0.7 * rows[0][token] + 0.3 * rows[1][token])
    (response,) = EnsembleLM(ensemble).loglikelihood([Request((context, continuation))])
    assert response[0] == pytest.approx(expected, rel=1e-9)
    assert response[1] is False


@pytest.mark.parametrize("piece", [False, True])
def test_loglikelihood_by_segment_equals_brute_force(piece: bool) -> None:
    ensemble = toys(piece=piece)
    data = b" the bird and the other"
    ends, parts = [], []
    for member in ensemble.members:
        engine = member.engine
        before = engine.prompts.raw("one").tolist()
        ids = engine.encoder.encode(data).ids
        place, mine = 0, {}
        total = 0.0
        for i, token in enumerate(ids):
            total += np.log(probabilities(engine, before + ids[:i])[token])
            place += len(engine.vocabulary.tokens[token])
            mine[place] = total
        ends.append(set(mine))
        parts.append(mine)
    common = sorted(ends[0] & ends[1])
    assert (len(common) < max(map(len, ends))) == piece
    expected, last = 0.0, 0
    for end in common:
        each = [part[end] - part.get(last, 0.0) for part in parts]
        expected += np.logaddexp(np.log(0.7) + each[0], np.log(0.3) + each[1])
        last = end
    (response,) = EnsembleLM(ensemble).loglikelihood([Request(("one", data.decode()))])
    assert response[0] == pytest.approx(expected, rel=1e-9)


def greedy_text(ensemble: Ensemble, context: str) -> str:
    return ensemble.generate(context, raw=True, method="greedy", max_tokens=6, seed=0).text


def test_greedy_is_the_most_likely_of_the_average() -> None:
    members = [LoadedMember(ToyEngine(table=wordy_table(seed)), f"m{seed}") for seed in (1, 2)]
    ensemble = Ensemble(members, [0.6, 0.4])
    text = greedy_text(ensemble, "river")
    assert len(text) > 10
    lm = EnsembleLM(ensemble)
    requests = [
        Request(("river", text)),
        Request(("river", text + " the")),
        Request(("river", "")),
        Request(("", " the")),
    ]
    responses = lm.loglikelihood(requests)
    assert [greedy for _, greedy in responses][:3] == [True, text + " the" == greedy_text(ensemble, "river"), True]
    assert responses[2][0] == 0.0
    alone = EnsembleLM(Ensemble(ensemble.members[:1]))
    assert EnsembleLM(ensemble, options={"method": "single"}).loglikelihood(requests) == alone.loglikelihood(requests)


def test_greedy_in_pieces_asks_every_member() -> None:
    def certain(tokens: tuple[bytes, ...], data: bytes) -> ToyEngine:
        logits = np.full(len(tokens) + 2, -5.0)
        logits[tokens.index(data)] = 5.0
        return ToyEngine(tokens, lambda _: logits)

    agreed = [LoadedMember(certain(WORD_TOKENS, b"e"), "a"), LoadedMember(certain(OTHER_TOKENS, b"e"), "b")]
    apart = [agreed[0], LoadedMember(certain(OTHER_TOKENS, b"o"), "b")]
    request = [Request(("x", "ee"))]
    assert EnsembleLM(Ensemble(agreed)).loglikelihood(request)[0][1] is True
    assert EnsembleLM(Ensemble(apart)).loglikelihood(request)[0][1] is False
    assert EnsembleLM(Ensemble(apart, [1.0, 0.0])).loglikelihood(request)[0][1] is True


def test_contexts_in_common_are_run_once() -> None:
    ensemble = toys()
    lm = EnsembleLM(ensemble)
    context = "the river turns " * 20
    lm.loglikelihood([Request((context, " stone")), Request(("another", " bird")), Request((context, " light"))])
    ran: list[int] = []
    for session in lm.scorer._sessions.values():
        plain = session.forward
        session.forward = lambda ids, last, plain=plain: (ran.append(len(ids)), plain(ids, last))[1]
    lm.loglikelihood([Request((context, " cloud")), Request(("zzz", " bird")), Request((context, " one"))])
    whole = len(ensemble.members[0].engine.prompts.raw(context.rstrip()))
    assert sum(length >= whole for length in ran) <= 2
    assert len(ran) == 6


def test_rolling_is_what_scoring_gives() -> None:
    ensemble = toys(piece=True)
    text = "the river turns under the stone " * 5
    (response,) = EnsembleLM(ensemble).loglikelihood_rolling([Request((text,))])
    assert response == pytest.approx(score(ensemble, text).mixture(ensemble.weights).sum())
    assert EnsembleLM(ensemble).loglikelihood_rolling([Request(("",))]) == [0.0]


def routed(kind: str, unit: str) -> Ensemble:
    """Toys that never draw the token that begins a text. In pieces each spells a text byte by byte."""
    vocabularies = [SHARED, SHARED] if unit == "token" else [LETTERS, LETTERS[::-1]]
    members = [LoadedMember(speaking(i, vocabulary), f"m{i}") for i, vocabulary in enumerate(vocabularies)]
    weights = np.array([0.3, 0.7])
    router: dict[str, Router] = {
        "fixed": FixedRouter(weights),
        "prompt": PromptRouter(weights, 0.5),
        "learned": LearnedRouter(np.random.default_rng(0).normal(size=(2, FEATURES)), ("m0", "m1")),
        "function": FunctionRouter(lambda prompt, tail: [len(prompt), 1 + tail.count(b"b")], 2),
    }
    return Ensemble(members, weights, router=router[kind], unit=cast(Any, unit))


@pytest.mark.parametrize("kind", ["fixed", "prompt", "learned", "function"])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_an_answer_has_the_probability_that_conventional_gives_its_steps(kind: str, unit: str) -> None:
    ensemble = routed(kind, unit)
    pieces = [b"ab", b" c", b"ab", b"c"] if unit == "token" else [bytes([byte]) for byte in b"abccab"]
    text = b"".join(pieces).decode()
    responses = EnsembleLM(ensemble).loglikelihood([Request((context, text)) for context in ("ba", "cabba", "ba")])
    for context, (value, _) in zip(("ba", "cabba", "ba"), responses, strict=True):
        prompts = ensemble.encode_prompt(context, ensemble.settings(raw=True))
        assert value == pytest.approx(stepwise(ensemble, prompts, pieces), rel=1e-6)
    plain = EnsembleLM(routed("fixed", unit)).loglikelihood([Request(("ba", text))])
    assert (responses[0][0] == pytest.approx(plain[0][0])) == (kind == "fixed")


@pytest.mark.parametrize("kind", ["prompt", "learned", "function"])
def test_all_texts_of_two_letters_and_all_shorter_ones_that_end_have_probability_one(kind: str) -> None:
    ensemble = routed(kind, "piece")
    prompts = ensemble.encode_prompt("ba", ensemble.settings(raw=True))
    texts = [b"".join(letters).decode() for letters in product(LETTERS, repeat=2)]
    responses = EnsembleLM(ensemble).loglikelihood([Request(("ba", text)) for text in texts])
    shorter = [stepwise(ensemble, prompts, pieces) for pieces in ([END], *([piece, END] for piece in LETTERS))]
    assert sum(np.exp([*(logprob for logprob, _ in responses), *shorter])) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["prompt", "function"])
def test_routers_see_the_same_context_as_in_completions(kind: str) -> None:
    ensemble = toys(router=routed(kind, "token").router)
    seen: list[bytes] = []
    begin = ensemble.router.begin

    def noting(context: Any) -> Any:
        seen.append(context.text)
        if kind == "prompt":
            seen.append(context.bits_per_byte().round(6).tobytes())
        return begin(context)

    ensemble.router.begin = noting  # type: ignore[method-assign]
    lm = EnsembleLM(ensemble)
    packed = lm.apply_chat_template([*HISTORY, {"role": "assistant", "content": "It is"}], False)
    lm.loglikelihood([Request((packed, " river"))])
    scored = seen.copy()
    seen.clear()
    lm.generate_until([Request((packed, {**SAMPLED, "max_gen_toks": 1}))])
    assert scored == seen[-len(scored) :]  # a router that needs bits per byte may begin twice
    assert scored[0].endswith(b"<end>\nIt is")


def test_greedy_under_a_router_is_the_most_likely_of_the_average() -> None:
    members = [LoadedMember(ToyEngine(table=wordy_table(seed)), f"m{seed}") for seed in (1, 2)]
    # The first member alone writes the first word, the second one the rest.
    ensemble = Ensemble(
        members, router=FunctionRouter(lambda prompt, tail: [0.999, 0.001] if not tail else [0.001, 0.999], 2)
    )
    text = greedy_text(ensemble, "river")
    responses = EnsembleLM(ensemble).loglikelihood([Request(("river", text)), Request(("river", text[:-1]))])
    assert responses[0][1] is True
    alone = [greedy_text(Ensemble([member]), "river") for member in members]
    assert text not in alone
    assert [
        text for _, text in EnsembleLM(ensemble).loglikelihood([Request(("river", greedy)) for greedy in alone])
    ] == [False] * 2


def test_weights_by_prompt_want_the_whole_prompt() -> None:
    engines = [ToyEngine(context_length=24), ToyEngine(seed=1)]
    members = [LoadedMember(engine, f"m{i}") for i, engine in enumerate(engines)]
    lm = EnsembleLM(Ensemble(members, router=PromptRouter(np.array([0.5, 0.5]))))
    assert lm.loglikelihood([Request(("b" * 60, " the"))]) == [(-np.inf, False)]
    assert "weights depend on how it is read" in lm.log.records[0]["error"]
    assert np.isfinite(EnsembleLM(Ensemble(members)).loglikelihood([Request(("b" * 60, " the"))])[0][0])


def test_rolling_under_a_router_is_what_scoring_gives() -> None:
    ensemble = toys(piece=True)
    ensemble.router = LearnedRouter(np.random.default_rng(0).normal(size=(2, FEATURES)), ensemble.names)
    text = "the river turns under the stone " * 5
    (response,) = EnsembleLM(ensemble).loglikelihood_rolling([Request((text,))])
    scores = score(ensemble, text)
    assert response == pytest.approx(scores.mixture(router_weights(scores, ensemble.router)).sum())
    assert response != pytest.approx(scores.mixture(ensemble.weights).sum())


def test_what_is_too_long_is_cut_or_counts_as_wrong() -> None:
    engine = ToyEngine(WORD_TOKENS, random_table(len(WORD_TOKENS) + 2, 3), context_length=24)
    ensemble = Ensemble([LoadedMember(engine, "short")])
    lm = EnsembleLM(ensemble)
    long, tail = "bbbbbbbb" * 9 + "a" * 20, "a" * 20
    first, two = lm.loglikelihood([Request((long, " the")), Request((tail, " the"))])
    assert first[0] == pytest.approx(two[0])
    lm = EnsembleLM(ensemble)
    assert lm.loglikelihood([Request(("x", "y" * 40))]) == [(-np.inf, False)]
    lm = EnsembleLM(ensemble)
    assert lm.generate_until([Request((long, {"do_sample": True}))]) == [""]
    assert "context holds 24" in lm.log.records[0]["error"]


SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}


def test_texts_are_those_of_the_ensemble() -> None:
    ensemble = toys()
    lm = EnsembleLM(ensemble, options={"seed": 5, "top_k": 10})
    responses = lm.generate_until([Request(("b", SAMPLED)), Request(("a", SAMPLED)), Request(("a", SAMPLED))])
    for i, prompt in enumerate("baa"):
        settings = {"raw": True, "temperature": 1.0, "top_k": 10, "max_tokens": 8, "seed": 5, "sequence": i}
        assert responses[i] == ensemble.generate(prompt, **settings).text
    assert responses[1] != responses[2]


def test_until_and_lengths_are_kept() -> None:
    ensemble = toys()
    plain = ensemble.generate("a", raw=True, temperature=1.0, max_tokens=30, seed=0).text
    stop = plain[5:7]
    (response,) = EnsembleLM(ensemble).generate_until(
        [Request(("a", {**SAMPLED, "max_gen_toks": 30, "until": [stop, ""]}))]
    )
    assert response == plain[: plain.index(stop)]
    options = generation_options(
        {"until": "x", "max_new_tokens": 7, "do_sample": True}, {"stop": ["y"], "method": "mixture"}
    )
    assert (options["stop"], options["max_tokens"]) == (("x", "y"), 7)
    assert generation_options(SAMPLED, {"max_tokens": 3})["max_tokens"] == 3


@pytest.mark.parametrize(
    ("task", "overrides", "greedy"),
    [
        ({"do_sample": False, "temperature": 1.0}, {}, True),
        ({"temperature": 0.0}, {}, True),
        ({"do_sample": True, "temperature": 0.0}, {}, True),
        ({}, {}, True),
        ({"temperature": 0.7}, {}, False),
        ({"do_sample": True}, {}, False),
        ({"do_sample": False}, {"temperature": 0.7}, False),
        ({"do_sample": True, "temperature": 1.0}, {"method": "greedy"}, True),
    ],
)
def test_which_requests_are_greedy(task: dict[str, Any], overrides: dict[str, Any], greedy: bool) -> None:
    assert is_greedy(task, overrides) == greedy
    options = generation_options(task, {"method": "mixture", **overrides})
    assert (options["method"] == "greedy") == greedy
    assert not greedy or "temperature" not in options


def test_single_stays_single_when_it_is_greedy() -> None:
    ensemble = toys()
    task = {"do_sample": False, "max_gen_toks": 6}
    (response,) = EnsembleLM(ensemble, options={"method": "single"}).generate_until([Request(("a", task))])
    assert response == ensemble.generate("a", raw=True, method="single", temperature=0, max_tokens=6).text


def test_options_without_counterpart_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_beams 4"):
        generation_options({"num_beams": 4}, {})
    with pytest.raises(ConfigError, match=r"'max_gen_tokens', which mixlm has not \(did you mean"):
        generation_options({"max_gen_tokens": 4}, {})
    with pytest.raises(ConfigError, match="sequence is no option"):
        EnsembleLM(toys(), options={"sequence": 1})


HISTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who sings? \x1e <end>"},
]


def test_conversations_pass_through_unrendered() -> None:
    lm = EnsembleLM(toys())
    packed = lm.apply_chat_template(HISTORY)
    assert unpack(packed).messages == tuple(Message(message["role"], message["content"]) for message in HISTORY)
    begun = unpack(lm.apply_chat_template([*HISTORY, {"role": "assistant", "content": "It is"}], False))
    assert (begun.text, (begun.messages or ())[-1]) == ("", Message("assistant", "It is"))
    assert begun.form.continue_final_message
    assert not unpack(packed).form.continue_final_message
    assert unpack("plain text").messages is None
    assert lm.tokenizer_name == "mixlm toy0 + toy1"
    with pytest.raises(ConfigError, match="role 'tool'"):
        unpack(pack([{"role": "tool", "content": "x"}]))


class Templated(ToyEngine):
    """A toy with a template of its own."""

    def __init__(self, template: str, seed: int) -> None:
        super().__init__(table=random_table(len(WORD_TOKENS) + 2, seed))
        self.prompts._render = lambda messages, form=None: (
            "<begin>" + "".join(template.format(message.role, message.content) for message in messages).rstrip()
        )


def test_every_member_reads_its_own_template(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [Templated("{}: {}\n", 1), Templated("[{}] {} ", 2)]
    ensemble = Ensemble([LoadedMember(engine, f"m{i}") for i, engine in enumerate(engines)])
    lm = EnsembleLM(ensemble, options={"method": "conventional", "system": "sing", "seed": 3})
    history = [*HISTORY, {"role": "assistant", "content": "It"}]
    contexts: list[tuple[np.ndarray, ...]] = []
    start = GenerationContext.start

    def recording(context: GenerationContext, prompt: EncodedPrompt) -> Generation:
        contexts.append(prompt.ids)
        return start(context, prompt)

    monkeypatch.setattr(GenerationContext, "start", recording)
    lm.generate_until([Request((lm.apply_chat_template(history), SAMPLED))])
    ((first, second),) = contexts
    spelled = [b"".join(engines[0].vocabulary.tokens[i] for i in ids).decode() for ids in (first, second)]
    said = "who sings? \x1e <end>"
    assert spelled[0] == f"system: sing\n\nbe brief\nuser: {said}\nassistant: It"
    assert spelled[1] == f"[system] sing\n\nbe brief [user] {said} [assistant] It"


def test_choices_are_scored_behind_a_conversation() -> None:
    ensemble = toys()
    lm = EnsembleLM(ensemble)
    engine = ensemble.members[0].engine
    (response,) = lm.loglikelihood([Request((lm.apply_chat_template(HISTORY), " river"))])
    before = engine.prompts.chat([Message(message["role"], message["content"]) for message in HISTORY]).tolist()
    token = WORD_TOKENS.index(b" river")
    rows = [probabilities(member.engine, before)[token] for member in ensemble.members]
    assert response[0] == pytest.approx(np.log(0.7 * rows[0] + 0.3 * rows[1]))


def test_the_harness_itself_can_run_it(task) -> None:
    from lm_eval.evaluator import evaluate

    from mixlm.evaluation.catalog import load_tasks, quiet

    tasks = load_tasks([task("choice"), task("generate")])
    with quiet():
        results = evaluate(EnsembleLM(toys()), {"tasks": tasks}, limit=3, bootstrap_iters=0)
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1
    assert len(results["samples"]["generate"]) == 3
