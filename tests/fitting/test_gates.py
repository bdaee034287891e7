"""Gates: their gradient against finite differences, what they learn, their files, and the way to use them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_texts import made
from toys import toys

from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting import gate_trainer
from mixlm.fitting.gate_trainer import gradients
from mixlm.fitting.gates import choose_inputs, mixture_loss, train_gate, untrained
from mixlm.fitting.likelihood import expectation_maximisation
from mixlm.routing import LearnedRouter
from mixlm.routing.base import describe_router
from mixlm.routing.features import FEATURES
from mixlm.routing.gate import Gate
from mixlm.routing.gate_router import TOP_K_FEATURES, GateInputs, GateRouter, load_router, top_k_features
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.score import score
from mixlm.scoring.scores import Scores, router_weights

TOP = GateInputs(("top_k",), "m0", 6)
HIDDEN = GateInputs(("hidden",), "m0", 0, 12)
ALL = GateInputs(("text", "top_k", "hidden"), "m0", 6, 12)


@pytest.fixture(autouse=True)
def one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trials than a user's: the choice among them is a minimum."""
    monkeypatch.setattr(gate_trainer, "PENALTIES", (5e-3,))
    monkeypatch.setattr(gate_trainer, "DECAYS", (0.0,))


def observed_scores(segments: int, seed: int, *, rule: str = "margin") -> Scores:
    """Scores in which the better of two members follows from what is observed of the first."""
    rng = np.random.default_rng(seed)
    logits = np.sort(rng.normal(scale=2, size=(segments, 6)))[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    hidden = rng.normal(size=(segments, 12)).astype(np.float16)
    # A distance is what a linear gate cannot learn.
    first = np.exp(logprobs[:, 0]) > 0.6 if rule == "margin" else np.abs(hidden[:, 0]) > 0.67
    table = np.where(first[:, None], [-0.5, -3.0], [-3.0, -0.5]) + rng.normal(scale=0.1, size=(segments, 2))
    ids = np.tile(np.arange(6), (segments, 1))
    return replace(made(table), observed=ObservedStates("m0", ids, logprobs, hidden))


def random_gate(members: int, inputs: int, width: int, seed: int = 0) -> Gate:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    return Gate(
        array(inputs), np.abs(array(inputs)) + 1, array(members, inputs), array(members),
        array(width, inputs), array(width), array(members, width),
    )  # fmt: skip


@pytest.mark.parametrize("width", [0, 5])
def test_the_gradient_is_that_of_the_loss(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    gate, x = random_gate(3, 4, width), rng.normal(size=(7, 4)).astype(np.float32)
    likelihood, prices = rng.random((7, 3)), np.array([0.0, 0.3, 0.7])
    monkeypatch.setattr(gate_trainer, "_ITEMS", 3)

    def found(changed: Gate) -> tuple[float, dict[str, np.ndarray]]:
        return gradients(changed, x, partial(mixture_loss, likelihood, prices))

    # Inputs that are standardised already.
    plain = replace(gate, centre=np.zeros(4, dtype=np.float32), scale=np.ones(4, dtype=np.float32))
    weights = plain.weights(x)
    loss, slopes = found(gate)
    assert loss == pytest.approx((weights @ prices - np.log((weights * likelihood).sum(axis=1))).mean(), abs=1e-5)
    for name, slope in slopes.items():
        array = getattr(gate, name)
        for index in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[index] = 1e-2
            ends = [found(replace(gate, **{name: array + sign * step}))[0] for sign in (1, -1)]
            assert slope[index] == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "kind", "rule"), [(TOP, "linear", "margin"), (HIDDEN, "mlp", "distance")])
def test_a_gate_learns_what_the_observed_member_shows(inputs: GateInputs, kind: Any, rule: str) -> None:
    router = train_gate([observed_scores(1200, 1, rule=rule)], inputs, kind)
    fresh = observed_scores(1000, 2, rule=rule)
    em = fresh.bits_per_byte(fresh.mixture(expectation_maximisation(fresh).weights))
    gate = fresh.bits_per_byte(fresh.mixture(router_weights(fresh, router)))
    oracle = fresh.bits_per_byte(fresh.logprobs.max(axis=1))
    assert em - gate > 0.8 * (em - oracle)


def test_where_there_is_nothing_to_learn_the_weights_stay_those_of_em() -> None:
    scores = observed_scores(800, 3)
    rng = np.random.default_rng(0)
    noise = replace(scores, logprobs=-rng.gamma(2.0, 1.0, size=(800, 2)))
    weights = router_weights(noise, train_gate([noise], ALL))
    assert np.abs(weights - expectation_maximisation(noise).weights).max() < 0.15


@pytest.mark.slow
def test_training_is_reproducible_and_tells_what_is_missing() -> None:
    scores = observed_scores(100, 1)
    assert train_gate([scores], TOP).digest == train_gate([scores], TOP).digest
    with pytest.raises(ConfigError, match="hold no observations of m0"):
        train_gate([replace(scores, observed=None)], TOP)
    with pytest.raises(ConfigError, match="too little text"):
        train_gate([observed_scores(8, 1)], TOP, "mlp")
    assert train_gate([observed_scores(8, 1)], TOP).observes  # of few inputs, with the largest penalty
    with pytest.raises(ConfigError, match="different members"):
        train_gate([scores, replace(scores, names=("a", "b"))], TOP)


def test_statistics_of_likely_tokens() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]]))
    row = top_k_features(np.vstack([logprobs, [[0.0, *[-np.inf] * 5]]]))
    assert row.shape == (2, TOP_K_FEATURES)
    assert np.isfinite(row).all()
    np.testing.assert_allclose(row[0, :5], np.exp(logprobs[0, :5]))
    assert row[0, -4] == pytest.approx(-(np.exp(logprobs) * logprobs).sum())  # entropy
    assert row[0, -3] == pytest.approx(0.25)  # margin
    assert row[0, -2] == pytest.approx(np.log(2))
    assert row[0, -1] == pytest.approx(0.03125)  # tail
    assert row[1, 0] == 1
    assert row[1, -4] == 0


@pytest.mark.parametrize(
    "inputs", [GateInputs(("text",)), TOP, HIDDEN, ALL], ids=lambda inputs: "+".join(inputs.groups)
)
def test_a_gate_is_written_and_read_back(inputs: GateInputs, tmp_path: Path) -> None:
    router = GateRouter(random_gate(2, inputs.size, 3), ["m0", "m1"], inputs)
    router.save(tmp_path / "gate.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.json", "gate.safetensors"]
    again = load_router(tmp_path / "gate.json")
    assert isinstance(again, GateRouter)
    assert again.digest == router.digest
    assert again.inputs == inputs
    turned = again.for_members(["m1", "m0"])
    if inputs.observed is not None:
        assert turned.observes is not None
        assert turned.observes.member == 1
    rows = np.random.default_rng(0).normal(size=(4, inputs.size))
    np.testing.assert_allclose(turned.gate.weights(rows)[:, ::-1], router.gate.weights(rows), atol=1e-6)


def changed(path: Path, **fields: Any) -> None:
    form = json.loads(path.read_text())
    path.write_text(json.dumps({**form, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "it is of version 2, and this mixlm reads version 1"),
        ({"observes": {"member": "m0", "top_k": 6, "hidden_size": 12, "layer": -4}}, "it observes the layer -4"),
        ({"observes": {"member": "m9", "top_k": 6, "hidden_size": 12, "layer": "last"}}, "observes m9, which is none"),
        ({"observes": {"member": "m0", "top_k": 6, "hidden_size": 7, "layer": "last"}}, r"has the shape \(83,\)|shape"),
        ({"observes": None}, "a gate on text, top_k, hidden has top_k 0"),
        ({"features": ["smell"]}, "they must be some of text, top_k, hidden"),
        ({"members": ["m0"]}, "shape"),
        ({"numbers": "none.safetensors"}, r"none\.safetensors, (cannot be read|are no safetensors)"),
        ({"numbers": "gate.json"}, "are no safetensors"),
        ({"version": None}, "it is of version None"),
        ({"observes": "m0"}, "a value in it has another type"),
        ({"observes": {"member": "m0", "top_k": "6", "hidden_size": 12, "layer": "last"}}, "has another type"),
        ({"members": None}, "has another type"),
        ({"digest": "0"}, r"gate\.safetensors, are those of another gate"),
    ],
)
def test_a_file_of_another_version_layer_or_shape_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "gate.json"
    GateRouter(random_gate(2, ALL.size, 3), ["m0", "m1"], ALL).save(path)
    changed(path, **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        load_router(path)
    assert "gate.json" in caught.value.message


def test_two_files_of_different_gates_are_told_apart(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        GateRouter(random_gate(2, TOP.size, 0, seed), ["m0", "m1"], TOP).save(tmp_path / f"{name}.json")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert one.stat().st_mode == (tmp_path / "one.json").stat().st_mode  # whoever reads one reads the other
    one.write_bytes(two.read_bytes())
    with pytest.raises(ConfigError, match="those of another gate") as caught:
        load_router(tmp_path / "one.json")
    assert "keep the two files" in str(caught.value)
    path = tmp_path / "two.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}))
    assert load_router(path).members == 2  # written before there were digests


def test_old_files_are_read_and_a_file_that_lacks_something_names_it(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    LearnedRouter(np.arange(2.0 * FEATURES).reshape(2, FEATURES) / 7, ["a", "b"]).save(path)
    router = LearnedRouter.load(path)
    assert describe_router(router) == "LearnedRouter bd5201d7380456da"  # folders begun before gates continue
    assert describe_router(router.for_members(["b", "a"])) == "LearnedRouter 76e76083b0e1296f"
    gate = GateRouter(router.gate, router.names, router.inputs)
    gate.save(path)
    with pytest.raises(ConfigError, match=r"the gate in .* is not a linear one"):
        LearnedRouter.load(path)
    path.write_text('{"kind": "gate"}')
    with pytest.raises(ConfigError, match="'version' is missing"):
        load_router(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not a learned router: maximum recursion depth"):
        load_router(path)
    path.write_text("no")
    with pytest.raises(ConfigError, match="is not a learned router"):
        load_router(path)


@pytest.mark.parametrize("groups", [("top_k",), ("hidden",), ("text", "top_k", "hidden")], ids="+".join)
def test_a_gate_weighs_a_text_as_it_weighs_its_states_in_generation(groups: tuple[str, ...]) -> None:
    plain = toys("token", 2)
    inputs = choose_inputs(plain, groups)
    router = GateRouter(random_gate(2, inputs.size, 4), plain.names, inputs)
    ensemble = plain.with_router(router)
    text = b"abc ab cab"
    scores = score(ensemble, text)
    along = router_weights(scores, router)
    settings = ensemble.settings(raw=True, method="mixture", temperature=1.0, top_k=0)
    context = ensemble.context(settings)
    sequence = context.begin_sequence(ensemble.encode_prompt("", settings))
    tokens = [text[start:end] for start, end in zip(scores.starts, scores.ends, strict=True)]
    for expected, token in zip(along, tokens, strict=True):
        seen: list[np.ndarray] = []

        class Noise:
            def coin(self, weights: np.ndarray) -> int:
                seen.append(weights)  # noqa: B023
                return 0

            def sample(self, symbols: np.ndarray, logprobs: np.ndarray) -> int:
                return 0

        context.decode_step(sequence, Noise())  # type: ignore[arg-type]
        np.testing.assert_allclose(seen[0], expected, atol=2e-5)
        sequence.state.append(
            next(symbol for symbol in range(ensemble.unit.end) if ensemble.unit.symbol_bytes(symbol) == token)
        )


def test_what_a_gate_observes_is_checked_against_the_members() -> None:
    ensemble = toys("token", 2)
    assert choose_inputs(ensemble, ("text",)) == GateInputs(("text",))
    assert choose_inputs(ensemble, ("hidden", "top_k"), "m1").observed == "m1"
    assert choose_inputs(ensemble, ("hidden", "top_k")).groups == ("top_k", "hidden")
    with pytest.raises(ConfigError, match="'m9' is not a member"):
        choose_inputs(ensemble, ("top_k",), "m9")
    with pytest.raises(ConfigError, match="no group of features"):
        choose_inputs(ensemble, ("colour",))
    with pytest.raises(ConfigError, match="no member is observed"):
        choose_inputs(ensemble, ("text",), "m0")
    ensemble.members[1].engine.weights_bytes = 10  # the other one's is that of a server: not known
    with pytest.raises(ConfigError, match="the size of m0 is not known"):
        choose_inputs(ensemble, ("top_k",))
    ensemble.members[0].engine.hidden_size = None
    with pytest.raises(UnsupportedError, match="toy gives no hidden states of m0"):
        choose_inputs(ensemble, ("hidden",), "m0")
    assert np.allclose(untrained(["a", "b"], GateInputs(("text",))).weights_at(np.ones((1, FEATURES)), None), 0.5)
