"""Routers keep the distribution in every unit; one that looks at the author does not. And the weights of each."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import toys

from mixlm.binding import LoadedMember
from mixlm.config import RouterConfig, parse_config, read_config, write_config
from mixlm.core.options import GenerationOptions
from mixlm.decoding.mixture import mixture
from mixlm.engines.toy import ToyEngine, random_table
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.sequence import DecodeStep, Flow
from mixlm.loading import load_config
from mixlm.routing import FixedRouter, FunctionRouter, LearnedRouter, PromptContext, PromptRouter, Route, Router
from mixlm.routing.features import FEATURES
from mixlm.routing.gate_router import GateRouter, load_router
from mixlm.routing.prompt import weights_by_bits
from mixlm.verification.check import check

LETTERS = [b"a", b"b", b"c", b"ab", b" a", b"\n", b"bc", b" "]


def make_ensemble(unit: str, router: Router | None = None) -> Ensemble:
    """Two members; in the unit `piece` each has an order and tokens of its own."""
    specs = []
    for i in range(2):
        tokens = [bytes([b]) for b in range(256)] + LETTERS[3:5]
        if unit == "piece":
            tokens = tokens[i:] + tokens[:i] + [b"x" * (i + 2), b"bc"][i:]
        size = len(tokens) + 2
        bias = np.full(size, -9.0)
        bias[[tokens.index(letter) for letter in LETTERS if letter in tokens]] = 0
        table = random_table(size, seed=i)
        engine = ToyEngine(tokens, lambda context, t=table, b=bias: t(context) + b, name=f"toy-{i}")
        specs.append(LoadedMember(engine, engine.name))
    return Ensemble(specs, [1, 2], unit=unit, router=router)  # type: ignore[arg-type]


def by_last_byte(prompt: bytes, tail: bytes) -> list[float]:
    """Weights that change a great deal from text to text."""
    return [16.0, 1.0] if tail[-1:] in (b"a", b"b") else [1.0, 16.0] if tail else [1.0, 1.0]


WEIGHTS = np.array([0.15, 0.85])
ROUTERS = {
    "fixed": FixedRouter(WEIGHTS),
    "prompt": PromptRouter(WEIGHTS, 0.5),
    "function": FunctionRouter(by_last_byte, 2),
    "learned": LearnedRouter(np.random.default_rng(0).normal(scale=2.0, size=(2, FEATURES)), ["m0", "m1"]),
}
PLAIN: Any = {"raw": True, "temperature": 1.0, "top_k": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit"),
    [("fixed", "token"), ("prompt", "piece"), ("function", "token"), ("function", "piece"), ("learned", "piece")],
)
def test_a_router_keeps_the_distribution(name: str, unit: str) -> None:
    report = check(toys(unit, 2, router=ROUTERS[name]), "cab", samples=400, options=PLAIN)
    assert report.equal, report


class ByWriter:
    """A router that is broken: its weights depend on which member wrote last."""

    def __init__(self) -> None:
        self.last = 0

    def begin(self, context: PromptContext) -> Route:
        return self.route

    def route(self, state: Any) -> np.ndarray:
        if not state.tail(1):
            return np.array([0.5, 0.5])
        return np.array([0.95, 0.05] if self.last == 0 else [0.05, 0.95])


@pytest.mark.slow
def test_weights_that_depend_on_the_author_change_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    router = ByWriter()

    def noting(step: DecodeStep) -> Flow:
        [choice] = yield from mixture(step)
        router.last = choice.member
        return [choice]

    monkeypatch.setattr("mixlm.decoding.mixture.build", lambda options, context: noting)
    report = check(toys("piece", 2, router=router), "cab", samples=400, options=PLAIN)
    wrong = {(comparison.left, comparison.position) for comparison in report.comparisons if not comparison.equal}
    assert wrong == {("mixture", 2)}
    # The same strategy with a router that sees the text alone: noting who wrote is not what is wrong.
    fair = check(toys("piece", 2, router=FunctionRouter(by_last_byte, 2)), "cab", samples=400, options=PLAIN)
    assert fair.equal


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_reading_the_prompt_runs_no_token_twice(unit: str) -> None:
    plain = make_ensemble(unit)
    ensemble = make_ensemble(unit, PromptRouter(plain.weights, 0.1))
    settings = GenerationOptions(seed=3, max_tokens=12, ignore_end=True, raw=True)
    prompts = ensemble.encode_prompt("abcab", settings)
    writer = ensemble.context(settings)
    done = writer.start(prompts).finish()
    sampled = [sum(token.member == name for token in done.tokens) for name in ensemble.names]
    assert all(sampled)
    forwards = 0
    for session, ids in zip(writer.sessions, prompts.ids, strict=True):
        first, *later = session.stats.forwards
        # The prefill is the reading; the very first draw then needs no forward of its own, every later draw needs one.
        assert (first.tokens, first.cached) == (len(ids), 0)
        forwards += len(later)
        if unit == "token":
            for before, after in pairwise(session.stats.forwards):
                assert after.cached == before.cached + before.tokens
    assert forwards == sum(sampled) - 1


def test_weights_by_prompt() -> None:
    weights = np.array([0.2, 0.8])
    route = PromptRouter(weights, 2.0).begin(PromptContext(b"x", lambda: np.array([1.0, 2.0])))
    assert route(None) == pytest.approx(np.array([0.2 * 4, 0.8]) / 1.6)  # type: ignore[arg-type]
    assert weights_by_bits(weights, np.array([5.0, 1.0]), 0.0) == pytest.approx(weights)
    assert weights_by_bits(weights, np.array([5.0, 5.0]), 9.0) == pytest.approx(weights)


@pytest.mark.parametrize("bits", [[1.0, 5000.0], [np.inf, 1.0], [np.inf, np.inf], [0.0, 0.0]])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
def test_weights_by_prompt_are_always_weights(bits: list[float], weights: list[float]) -> None:
    result = weights_by_bits(np.array(weights), np.array(bits), 4.0)
    assert result.sum() == pytest.approx(1)
    assert (result >= 0).all()
    assert (result[np.array(weights) == 0] == 0).all()


@pytest.mark.parametrize("sharpness", [-1.0, float("nan"), float("inf")])
def test_a_sharpness_that_means_nothing_is_refused(sharpness: float) -> None:
    with pytest.raises(ConfigError, match="sharpness is"):
        PromptRouter(np.array([0.5, 0.5]), sharpness)


def test_a_function_sees_prompt_and_text_and_its_weights_are_checked() -> None:
    seen: list[tuple[bytes, bytes]] = []

    def function(prompt: bytes, tail: bytes) -> list[float]:
        seen.append((prompt, tail))
        return [1.0, 3.0]

    ensemble = make_ensemble("token", FunctionRouter(function, 2))
    text = ensemble.generate("ab", seed=0, max_tokens=4, ignore_end=True, raw=True).text.encode()
    assert [prompt for prompt, _ in seen] == [b"ab"] * 4
    assert seen[0][1] == b""
    assert all(text.startswith(tail) for _, tail in seen)
    bad = make_ensemble("token", FunctionRouter(lambda prompt, tail: [1.0], 2))
    with pytest.raises(ConfigError, match=r"1 weight \(1\) for 2 members"):
        bad.generate("ab", seed=0)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    matrix = np.random.default_rng(0).normal(size=(2, FEATURES))
    LearnedRouter(matrix, ["toy:1", "toy:2"]).save(tmp_path / "router.json")
    return tmp_path / "router.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "is not a learned router"),
        ("[]", "is not a learned router"),
        ("{}", "'kind' is missing"),
        ('{"kind": "other", "members": ["a"], "matrix": [[1]]}', "its kind is 'other'"),
        ('{"kind": "learned", "members": ["a"], "matrix": [[1]]}', "finite numbers"),
        ('{"kind": "learned", "members": ["a"], "matrix": [["x"]]}', "is not a learned router"),
        (
            f'{{"kind": "learned", "members": ["a"], "matrix": [{[float("nan")] * FEATURES}]}}',
            "is not a learned router",
        ),
        (f'{{"kind": "learned", "members": ["a"], "matrix": [{[1e39] * FEATURES}]}}', "finite numbers of 32 bits"),
    ],
)
def test_a_file_without_a_router_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "router.json"
    path.write_text(text.replace("nan", "NaN"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_router(path)
    assert "router.json" in caught.value.message
    assert "mixlm fit" in str(caught.value.hint)


def test_a_router_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_router(tmp_path / "none.json")


MEMBERS = [{"model": "toy:1", "weight": 0.25}, {"model": "toy:2", "weight": 0.75}]


@pytest.mark.parametrize(
    "router", [{}, {"kind": "fixed"}, {"kind": "prompt"}, {"kind": "prompt", "sharpness": 2.5}, {"kind": "learned"}]
)
def test_a_file_with_a_router_is_written_and_read(tmp_path: Path, gate: Path, router: dict[str, Any]) -> None:
    if router.get("kind") == "learned":
        router = {**router, "file": gate.name}
    raw = {"members": MEMBERS, "sampling": {"top_k": 5}, "router": router}
    config = parse_config(raw, "here")
    write_config(config, tmp_path / "pair.toml")
    again = read_config(tmp_path / "pair.toml")
    if config.router.file is not None:
        assert again.router.file == str(gate)
        again = again.model_copy(update={"router": again.router.model_copy(update={"file": gate.name})})
    assert again == config
    built = load_config(read_config(tmp_path / "pair.toml"))
    kind = {"prompt": PromptRouter, "learned": GateRouter}.get(config.router.kind, FixedRouter)
    assert isinstance(built.router, kind)
    assert built.generate("one", seed=0, max_tokens=3).text


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "learnt"}, r"router\.kind is 'learnt'.*'learned'"),
        ({"kind": "learned"}, "a learned router has a file"),
        ({"kind": "prompt", "file": "x.json"}, "a learned router has a file"),
        ({"kind": "prompt", "sharpnes": 1}, r"unknown key 'router\.sharpnes' .did you mean 'sharpness'"),
        ({"sharpness": "high"}, r"router\.sharpness is 'high'"),
    ],
)
def test_a_router_table_that_does_not_fit_is_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"members": MEMBERS, "router": router}, "here")


def test_a_learned_router_without_a_file_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="and no other kind has one") as caught:
        parse_config({"members": MEMBERS, "router": {"kind": "learned"}}, "here")
    assert caught.value.hint == "see mixlm fit --router"


def test_a_router_of_other_members_is_refused(gate: Path) -> None:
    raw = {"members": [*MEMBERS, {"model": "toy:3", "weight": 1.0}], "router": {"kind": "learned", "file": str(gate)}}
    with pytest.raises(ConfigError, match=r"was trained for toy:1, toy:2 .*toy:3"):
        load_config(parse_config(raw, "here"))


def test_the_default_is_fixed() -> None:
    assert RouterConfig().kind == "fixed"


class Constant:
    """A user's router that returns one value at every state."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def begin(self, context: PromptContext) -> Route:
        return lambda state: self.weights


WRONG_WEIGHTS = [
    ([0.5, 0.3, 0.2], "it must return 2 numbers"),
    ([1.0], "it must return 2 numbers"),
    ([], "it must return 2 numbers"),
    ([[0.5, 0.5]], "it must return 2 numbers"),
    (0.5, "it must return 2 numbers"),
    (None, "it must return 2 numbers"),
    ("ab", "it must return 2 numbers"),
    ({"toy-0": 0.5, "toy-1": 0.5}, "it must return 2 numbers"),
    (["0.5", "0.5"], "it must return 2 numbers"),
    ([0.5, None], "it must return 2 numbers"),
    ([True, False], "it must return 2 numbers"),
    ([0.5, [0.5]], "it must return 2 numbers"),
    ([1.5, -0.5], "a finite number, 0 or more"),
    ([float("nan"), 1.0], "a finite number, 0 or more"),
    ([float("inf"), 0.0], "a finite number, 0 or more"),
    ([0.5, 0.4], "sum to 0.9"),
    ([0.0, 0.0], "sum to 0"),
    ([2, 1], "sum to 3"),
]


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
@pytest.mark.parametrize(("weights", "reason"), WRONG_WEIGHTS, ids=str)
def test_the_weights_of_a_users_router_are_checked(unit: str, weights: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"the router Constant returned .*{reason}"):
        make_ensemble(unit, Constant(weights)).generate("abc", raw=True, seed=1, max_tokens=3)


def test_they_are_checked_at_every_position() -> None:
    class Late(Constant):
        def begin(self, context: PromptContext) -> Route:
            return lambda state: [0.5, 0.5] if not state.tail(1) else [0.5, 0.6]  # type: ignore[return-value]

    stream = make_ensemble("token", Late(None)).stream("abc", raw=True, seed=1, max_tokens=5, ignore_end=True)
    with pytest.raises(ConfigError, match=r"the router Late returned \[0\.5, 0\.6\]: weights must sum to 1.*1\.1"):
        list(stream)
    assert len(stream.completion.tokens) == 1


@pytest.mark.parametrize("weights", [[0.5, 0.5], (1, 0), np.array([0.25, 0.75], dtype=np.float32), [np.int64(0), 1]])
def test_weights_of_any_kind_of_numbers_are_taken(weights: Any) -> None:
    options = {"raw": True, "seed": 1, "max_tokens": 8}
    expected = make_ensemble("token", FixedRouter(np.asarray(weights, dtype=np.float64))).generate("abc", **options)
    assert make_ensemble("token", Constant(weights)).generate("abc", **options).text == expected.text


@pytest.mark.parametrize(
    ("returned", "reason"),
    [(None, "None"), ([1], "1 weight"), ([1, -1], "0 or more"), ("ab", "a list"), ([0, 0], "greater than 0")],
    ids=str,
)
def test_a_function_is_a_router_and_its_weights_are_checked(returned: Any, reason: str) -> None:
    plain = make_ensemble("token", by_last_byte)  # type: ignore[arg-type]
    expected = make_ensemble("token", FunctionRouter(by_last_byte, 2))
    options = {"raw": True, "seed": 1, "max_tokens": 8}
    assert plain.generate("abc", **options).text == expected.generate("abc", **options).text
    with pytest.raises(ConfigError, match=f"the router's function returned.*{reason}"):
        make_ensemble("token", lambda prompt, text: returned).generate("abc", **options)  # type: ignore[arg-type]


def test_a_router_that_fails_is_named_with_the_reason() -> None:
    def fails(prompt: bytes, text: bytes) -> list[float]:
        raise KeyError("x")

    with pytest.raises(ConfigError, match="the router FunctionRouter failed: KeyError: 'x'"):
        make_ensemble("token", fails).generate("abc", raw=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "router",
    [
        FunctionRouter(lambda prompt, text: [1, 1, 1], 3),
        FixedRouter(np.array([1.0])),
        PromptRouter(np.full(3, 1 / 3)),
        LearnedRouter(np.zeros((3, FEATURES)), "abc"),
    ],
    ids=lambda router: type(router).__name__,
)
def test_a_router_for_other_members_is_refused_with_the_ensemble(router: Router) -> None:
    with pytest.raises(ConfigError, match=r"the router is for . members, and the ensemble has 2 of them"):
        make_ensemble("token", router)


@pytest.mark.parametrize("router", [3, "learned", [0.5, 0.5], FunctionRouter], ids=str)
def test_what_is_no_router_is_refused_with_the_ensemble(router: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a router or a function"):
        make_ensemble("token", router)


def test_routers_check_what_they_are_built_with() -> None:
    with pytest.raises(ConfigError, match="the router's function is 'ab'; it must be a function"):
        FunctionRouter("ab", 2)  # type: ignore[arg-type]
    for members in (0, -1, 2.0, None, True):
        with pytest.raises(ConfigError, match="the number of the ensemble's members"):
            FunctionRouter(by_last_byte, members)  # type: ignore[arg-type]
    for weights in ([0.5, 0.6], [1.5, -0.5], [np.nan, 1.0]):
        with pytest.raises(ConfigError, match="the router FixedRouter has the weights"):
            FixedRouter(np.array(weights))
    for nothing in ("ab", [], 0.5, [[0.5, 0.5]]):
        with pytest.raises(ConfigError, match="they must be numbers, one per member"):
            FixedRouter(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [lambda: [0.5, 0.5], lambda text: [0.5, 0.5], lambda a, b, c: [0.5, 0.5]])
def test_a_function_of_other_arguments_is_refused_with_the_ensemble(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot be called with \(prompt, text\): .*def f\(prompt, text\)"):
        make_ensemble("token", function)


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (3, "begin of the router Mine is 3; it must be a function"),
        (lambda self: None, r"begin of the router Mine cannot be called with \(context\)"),
        (lambda self, context: None, "what begin of the router Mine returned is None; it must be a function"),
        (lambda self, context: [0.5, 0.5], r"what begin of the router Mine returned is \[0.5, 0.5\]"),
        (lambda self, context: lambda: [0.5, 0.5], r"cannot be called with \(state\)"),
    ],
)
def test_a_router_that_begins_otherwise_is_refused(begin: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_ensemble("token", type("Mine", (), {"begin": begin})()).generate("a", max_tokens=1)
