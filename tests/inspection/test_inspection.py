from __future__ import annotations

import numpy as np
import pytest
from toys import END, SHARED, engine, fixed, make_ensemble, toys

from mixlm.binding import LoadedMember
from mixlm.engines.requests import Forward
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.inspection import inspect
from mixlm.inspection.measure import (
    LENGTHS,
    ForwardCost,
    measure_agreement,
    measure_rule,
    predict_speeds,
    time_forwards,
)
from mixlm.inspection.static import check_feasibility, compare_vocabularies, describe_members, describe_rule

TEXT = b"ab c abc a b c" * 9


def test_pieces_are_counted_by_their_bytes():
    # The second spells "a" twice and lacks "ab"; its own piece is "x".
    ensemble = make_ensemble([engine(SHARED), engine((b"a", b"b", b"c", b" ", b"a", b"x"))], unit="piece")
    [pair] = compare_vocabularies(ensemble)
    assert pair.common == 4
    assert pair.share == (4 / 6, 4 / 5)
    assert pair.distance is pair.mass is None


def test_masses_and_distances_are_those_of_the_distributions():
    toy = fixed({b"a": 0.5, b"ab": 0.25, END: 0.25})
    other = fixed({b"a": 0.125, b"b": 0.375, b"x": 0.25, END: 0.25}, (b"a", b"b", b"c", b" ", b"x"))
    ensemble = make_ensemble([toy, other], unit="piece")
    [pair] = measure_agreement(ensemble, TEXT, compare_vocabularies(ensemble))
    assert pair.mass == pytest.approx((0.75, 0.75))
    assert pair.distance == pytest.approx(0.5 * (0.375 + 0.25 + 0.375 + 0.25))


def test_positions_are_weighed_alike_and_distances_are_taken_at_common_boundaries_alone():
    # Beside a text, each distribution is another one at every position; a plain second computation over all of them.
    ensemble = toys("piece", 3)
    pairs = measure_agreement(ensemble, TEXT, compare_vocabularies(ensemble))
    distributions, marks = [], []
    for member in ensemble.members:
        tokens = member.engine.vocabulary.tokens
        ids = member.engine.encoder.encode(TEXT).ids
        place, mine = 0, {}
        for count in range(len(ids) + 1):
            logits = member.engine.table((len(tokens) - 2, *ids[:count])).astype(np.float32).astype(float)
            logits[len(tokens) - 2] = -np.inf
            distribution = np.exp(logits) / np.exp(logits).sum()
            mine[place] = {}
            for i, probability in enumerate(distribution):
                key = END if i == len(tokens) - 1 else tokens[i] or None
                if key is not None:
                    mine[place][key] = mine[place].get(key, 0) + probability
            place += len(tokens[ids[count]]) if count < len(ids) else 0
        distributions.append(mine)
        marks.append({*tokens} - {b""} | {END})
    for pair, (i, j) in zip(pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        places = sorted(distributions[i].keys() & distributions[j].keys())
        assert pair.places == len(places)
        assert {0, len(TEXT)} < set(places)
        distance = [
            sum(abs(distributions[i][place].get(u, 0) - distributions[j][place].get(u, 0)) for u in marks[i] | marks[j])
            / 2
            for place in places
        ]
        assert pair.distance == pytest.approx(np.mean(distance), abs=1e-9)
        for (a, b), mass in zip([(i, j), (j, i)], pair.mass, strict=True):
            expected = [
                sum(p for u, p in distribution.items() if u in marks[b]) for distribution in distributions[a].values()
            ]
            assert mass == pytest.approx(np.mean(expected), abs=1e-9)


def test_one_model_twice_agrees_wholly():
    toy = engine()
    [pair] = measure_agreement(ensemble := make_ensemble([toy, toy]), TEXT, compare_vocabularies(ensemble))
    assert (pair.distance, pair.mass, pair.share) == (0, pytest.approx((1, 1)), (1, 1))


def test_forwards_are_timed_behind_a_cache_and_a_shared_engine_once(monkeypatch):
    seen = []
    plain = ToyEngine.session

    def session(self):
        seen.append(plain(self))
        return seen[-1]

    monkeypatch.setattr(ToyEngine, "session", session)
    toy = engine()
    forwards = time_forwards(make_ensemble([toy, engine(seed=2), toy]), TEXT)
    assert len(forwards) == 3
    assert len(seen) == 2
    assert forwards[0] == forwards[2]
    cost = ForwardCost.of("m0", forwards[0])
    assert (cost.cached, set(cost.seconds)) == (128, set(LENGTHS))
    timed = [(token.tokens, token.cached) for token in seen[0].stats.forwards[1::2]]
    assert timed == [(length, 128) for length in LENGTHS] * 4


def test_a_context_too_small_to_time_is_refused():
    with pytest.raises(ConfigError, match="context length of toy is 16, too short"):
        time_forwards(make_ensemble([engine(context_length=16)]), TEXT)


def test_speeds_follow_the_cost_model():
    ensemble = make_ensemble([engine(), engine(seed=2), engine(seed=3)], [1, 1, 0])
    forwards = [[Forward(n, 128, c * (1 + s * (n - 1))) for n in LENGTHS] for c, s in ((0.1, 1), (0.3, 1 / 3), (9, 0))]
    speeds = {
        (speed.method, speed.members): speed.predicted for speed in predict_speeds(ensemble, ensemble.weights, forwards)
    }
    assert speeds == {
        ("single", ("m0",)): pytest.approx(10),
        ("single", ("m1",)): pytest.approx(1 / 0.3),
        ("single", ("m2",)): pytest.approx(1 / 9),
        ("conventional", ("m0", "m1", "m2")): pytest.approx(1 / 0.4),
        ("mixture", ("m0", "m1", "m2")): pytest.approx(1 / (0.5 * 0.2 + 0.5 * 0.4)),
    }


def test_a_forward_too_short_for_the_clock_has_a_speed():
    ensemble = make_ensemble([engine(), engine(seed=2)])
    speeds = predict_speeds(ensemble, ensemble.weights, [[Forward(1, 128, 0.0)]] * 2)
    assert [speed.predicted for speed in speeds] == [pytest.approx(1e9)] * 4


@pytest.mark.parametrize(
    ("unit", "methods"),
    [("piece", {"single", "conventional", "mixture"}), ("word", {"single", "mixture"}), ("byte", {"single"})],
)
def test_speeds_are_of_methods_that_the_unit_has(unit, methods):
    ensemble = make_ensemble([ToyEngine(), ToyEngine(seed=3)], [1, 1], unit=unit)
    report = inspect(ensemble)
    assert {speed.method for speed in report.speeds} == methods
    assert {speed.measured is not None for speed in report.speeds} == {unit != "byte"}


def test_a_member_is_described_by_what_its_engine_says():
    toy = ToyEngine(context_length=99)
    ensemble = make_ensemble([toy, ToyEngine(seed=3), toy], [2, 1, 1])
    first, second, third = describe_members(ensemble, "two <end>", {"system": "one"})
    assert (first.name, first.weight, first.rows, first.pieces, first.control) == ("m0", 0.5, 276, 274, 2)
    assert first.ends == {"<end>": 275}
    assert first.prompt == "<begin>system: one\nuser: two <end>\n"
    assert first.prompt_tokens == 1 + len("system:") + 2 + len("user:") + 1 + len(" <end>\n")
    assert first.context_length == 99
    assert (first.shares, second.shares, third.shares) == (None, None, "m0")
    assert first.reading["family"] == "bytes"


def test_what_is_not_possible_has_the_reason_it_is_refused_with():
    ensemble = toys("piece", 2)
    items = {item.name: item for item in check_feasibility(ensemble, {"temperature": 0.0})}
    with pytest.raises(UnsupportedError) as refused:
        Ensemble(ensemble.members, unit="token")
    assert (items["token"].possible, items["token"].reason) == (False, refused.value.with_hint)
    with pytest.raises(UnsupportedError) as refused:
        ensemble.context(ensemble.settings(temperature=0.0))
    assert (items["mixture"].possible, items["mixture"].reason) == (False, refused.value.with_hint)
    assert items["piece"].possible
    assert items["greedy"].possible
    assert items["single"].possible
    pair = check_feasibility(toys("token", 2).with_weights([1, 1]), {})
    assert [item.name for item in pair if not item.possible] == ["rule proxy"]  # it takes three members
    ruled = check_feasibility(toys("token", 2).with_weights([1, 1]), {"rule": "contrastive", "temperature": 0.0})
    units = {item.name: item.reason for item in ruled if item.kind == "unit"}
    assert [name for name, reason in units.items() if reason is None] == ["token"]
    assert units["piece"].startswith("rule contrastive divides by a member's probabilities")


def words() -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=i), f"m{i}") for i in (1, 2)], [3, 1])


def test_a_whole_inspection():
    seen = []
    report = inspect(words(), progress=lambda label, done, total: seen.append((label, done, total)))
    assert [member.name for member in report.members] == ["m1", "m2"]
    assert report.text_bytes > 500
    assert len(report.costs) == 2
    assert [speed.method for speed in report.speeds] == ["single", "single", "conventional", "mixture"]
    assert all(speed.measured for speed in report.speeds)
    assert {label for label, _, _ in seen} >= {"reading the sample text", "timing forward passes", "mixture"}
    form = report.as_dict()
    assert form["members"][0]["ends"] == {"<end>": 275}
    assert form["pairs"][0]["distance"] == report.pairs[0].distance


def test_nothing_runs_when_nothing_is_to_be_measured(monkeypatch):
    def fail(*_):
        raise AssertionError("a model was run")

    monkeypatch.setattr("mixlm.engines.toy.ToySession.forward", fail)
    report = inspect(words(), measure=False)
    assert report.pairs[0].common == 274
    assert (report.costs, report.speeds, report.text_bytes) == ((), (), 0)


def test_agreement_is_not_measured_where_distributions_are_partial():
    ensemble = words()
    ensemble.members[1].engine.top_k_limit = 64
    report = inspect(ensemble)
    assert report.unmeasured == "agreement is not measured, since only the most likely tokens are known of m2"
    assert (report.text_bytes, report.pairs[0].distance) == (0, None)
    assert [cost.member for cost in report.costs] == ["m1", "m2"]
    assert report.speeds


def test_a_method_that_cannot_be_run_is_not_measured():
    report = inspect(words(), options={"temperature": 0.0})
    assert all(speed.predicted and speed.measured is None for speed in report.speeds)


@pytest.mark.slow
def test_a_long_text_is_read_at_its_beginning():
    assert 3500 < inspect(words(), text="word after word " * 1000).text_bytes <= 4000


@pytest.mark.parametrize(
    ("value", "message"), [({"text": " \n"}, "sample text is empty"), ({"question": ""}, "question")]
)
def test_what_is_empty_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        inspect(words(), **value)


def test_a_text_longer_than_a_context_is_refused():
    ensemble = Ensemble([LoadedMember(ToyEngine(seed=i, context_length=50), f"m{i}") for i in (1, 2)])
    with pytest.raises(ConfigError, match=r"the sample text has \d+ tokens for toy, whose context length is 50"):
        inspect(ensemble)


@pytest.mark.models
def test_the_demo_pair(demo_pair):
    report = inspect(demo_pair, measure=False)
    smollm, gemma = report.members
    assert (smollm.rows, gemma.rows) == (49152, 262144)
    assert (smollm.reading["family"], gemma.reading["family"]) == ("byte-level", "SentencePiece")
    assert (smollm.reading["template"], gemma.reading["template"]) == ("its own", "plain")
    assert list(smollm.ends) == ["<|im_end|>"]
    assert smollm.prompt.endswith("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")
    assert gemma.prompt == "<bos>Question: Why is the sky blue?\nAnswer:"
    text = b"The river turns under the old bridge.\n\ndef main():\n    return 0\n"
    [pair] = measure_agreement(demo_pair, text, report.pairs)
    assert 45_000 < pair.common < 47_000
    assert min(pair.mass) > 0.9
    assert 0.1 < pair.distance < 0.8
    assert report.weights_bytes == smollm.weights_bytes + gemma.weights_bytes
    possible = {item.name: item.possible for item in report.possibilities}
    assert (possible["token"], possible["piece"], possible["mixture"]) == (False, True, True)


@pytest.mark.parametrize("engine", ["llamacpp", "hf"])
def test_a_gguf_file_is_neither_loaded_nor_converted_when_nothing_is_measured(tmp_path, monkeypatch, engine):
    from ggufs import write_tiny_gguf

    from mixlm.cli import main

    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mixlm.inspection.unloaded.load_engine", None)
    file = write_tiny_gguf(tmp_path / "tiny.gguf", context=64)
    assert main(["inspect", "--no-measure", "-m", str(file), "--engine", engine]) == 0
    assert [path.name for path in (tmp_path / "cache").glob("models/*")] == []


def test_a_rule_is_described_and_measured():
    ensemble = Ensemble([LoadedMember(ToyEngine(seed=i), f"m{i}") for i in range(2)])
    assert describe_rule(ensemble, {}) is None
    contrast = describe_rule(ensemble, {"rule": "contrastive", "strength": 0.3})
    assert (contrast.name, contrast.parameters) == ("contrastive", {"strength": 0.3})
    assert contrast.roles == {"expert": "m0", "amateur": "m1"}
    assert "one vocabulary" in contrast.needs
    options = {"rule": "max"}
    measured = measure_rule(ensemble, describe_rule(ensemble, options), "a", options)
    assert 0 < measured.stopped < 1
    assert 1 <= measured.forwards <= 2.5
    assert measured.tokens_per_second > 0
