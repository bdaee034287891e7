from __future__ import annotations

import math

import numpy as np
import pytest
from toys import END, OPTIONS, SHARED, VOCABULARIES, engine, exact_distribution, fixed, make_ensemble, table, toys

from mixlm.binding import LoadedMember
from mixlm.engines.toy import WORD_TOKENS, ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, MixlmError, PromptTooLongError, UnsupportedError
from mixlm.types import Message

METHODS = ["mixture", "conventional", "greedy", "single"]
RAW = {"raw": True, "seed": 3, "max_tokens": 12, "ignore_end": True}


def wordy(members: int = 2, **options) -> Ensemble:
    """Toys that can read any text, so that they can be prompted with messages, and look at all of it."""
    size = len(WORD_TOKENS) + 2
    return make_ensemble([ToyEngine(WORD_TOKENS, table(size, i, order=9999)) for i in range(members)], **options)


class TestRandomness:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("unit", ["token", "piece"])
    def test_the_same_seed_gives_the_same_text_run_after_run(self, unit, method):
        first, second = (toys(unit, 3).generate("ab", method=method, **RAW) for _ in range(2))
        assert first.text == second.text
        assert [token.logprob for token in first.tokens] == [token.logprob for token in second.tokens]
        assert first.seed == 3

    def test_the_order_of_work_does_not_matter(self):
        ensemble = toys("piece", 3)
        one_by_one = [ensemble.generate("ab", **RAW, sequence=i).text for i in range(4)]
        streams = [ensemble.stream("ab", **RAW, sequence=i) for i in range(4)]
        backwards = [stream.finish().text for stream in reversed(streams)]
        assert backwards[::-1] == one_by_one
        interleaved = [ensemble.stream("ab", **RAW, sequence=i) for i in range(4)]
        for _ in range(20):
            for stream in interleaved:
                next(stream, None)
        assert [stream.completion.text for stream in interleaved] == one_by_one
        assert len(set(one_by_one)) == 4

    def test_another_seed_or_sequence_gives_another_text(self):
        ensemble = toys("piece", 3)
        texts = {
            ensemble.generate("ab", **{**RAW, "seed": seed, "sequence": i}).text for seed in (1, 2) for i in (0, 1)
        }
        assert len(texts) == 4

    def test_a_completion_says_the_seed_it_was_given(self):
        ensemble = toys("token", 2)
        first = ensemble.generate("ab", raw=True, max_tokens=12)
        again = ensemble.generate("ab", raw=True, max_tokens=12, seed=first.seed)
        assert again.text == first.text


class TestEnds:
    def test_end_of_text_stops_a_completion_and_is_no_part_of_it(self):
        ensemble = make_ensemble([ToyEngine(SHARED, lambda context: np.eye(8)[7 if len(context) == 4 else 1] * 100)])
        completion = ensemble.generate("a", raw=True, max_tokens=9)
        assert completion.text == "abab"
        assert completion.finish_reason == "stop"
        assert len(completion.tokens) == 2

    def test_a_completion_that_ends_at_once_is_empty(self):
        completion = make_ensemble([fixed({END: 1.0})]).generate("a", raw=True)
        assert (completion.text, completion.tokens, completion.finish_reason) == ("", (), "stop")
        assert completion.usage.tokens_per_second == 0

    def test_max_tokens_cuts_a_completion(self):
        completion = make_ensemble([fixed({b"a": 1.0})]).generate("a", raw=True, max_tokens=5)
        assert (completion.text, completion.finish_reason, len(completion.tokens)) == ("aaaaa", "length", 5)

    def test_ends_can_be_ignored(self):
        completion = make_ensemble([fixed({END: 0.9, b"a": 0.1})]).generate(
            "a", raw=True, max_tokens=9, ignore_end=True
        )
        assert completion.text == "a" * 9

    @pytest.mark.parametrize("stop", ["bb", ["bb"], ["zz", "bb"]])
    def test_a_stop_string_ends_a_completion_before_it(self, stop):
        ensemble = make_ensemble([fixed({b"a": 0.5, b"b": 0.5})])
        results = [ensemble.generate("a", raw=True, seed=seed, stop=stop, max_tokens=40) for seed in range(8)]
        whole = [ensemble.generate("a", raw=True, seed=seed, max_tokens=40) for seed in range(8)]
        assert all("bb" in completion.text for completion in whole)
        assert [completion.text for completion in results] == [
            completion.text.partition("bb")[0] for completion in whole
        ]
        assert {completion.finish_reason for completion in results} == {"stop"}

    def test_a_stop_string_that_never_comes_changes_nothing(self):
        ensemble = toys("piece", 2)
        assert ensemble.generate("ab", **RAW, stop="xyz").text == ensemble.generate("ab", **RAW).text

    def test_what_may_be_the_beginning_of_a_stop_string_is_shown_at_the_end(self):
        completion = make_ensemble([fixed({b"a": 1.0})]).generate("a", raw=True, max_tokens=3, stop="aaaaa")
        assert (completion.text, completion.finish_reason) == ("aaa", "length")

    def test_the_models_own_stop_strings_count_in_chat_and_not_in_raw_text(self):
        toy = fixed({b" c": 1.0}, (*WORD_TOKENS, b" c"))
        toy.stops = (" c c",)
        ensemble = make_ensemble([toy])
        assert ensemble.generate("x", max_tokens=5).text == ""
        assert ensemble.generate("x", max_tokens=5, raw=True).text == " c" * 5

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("unit", ["token", "piece"])
    def test_a_full_context_ends_a_completion(self, unit, method):
        vocabularies = VOCABULARIES if unit == "piece" else [SHARED] * 3
        engines = [
            engine(vocabularies[0], 1, context_length=50),
            engine(vocabularies[1], 2, context_length=10),
            engine(vocabularies[2], 3, context_length=50),
        ]
        ensemble = make_ensemble(engines, unit=unit)
        completion = ensemble.generate("a", raw=True, seed=0, method=method, max_tokens=100, ignore_end=True)
        assert completion.finish_reason == "length"
        *before, last = [token.data for token in completion.tokens]
        encode = engines[1].encoder.encode
        if unit == "token":
            assert len(before) == 10 - len(engines[1].prompts.raw("a"))
        else:
            # All but the last piece fits the smallest context; with the last, it is full.
            prompt = len(engines[1].prompts.raw("a"))
            assert prompt + len(encode(b"".join(before)).ids) <= 10
            assert prompt + len(encode(b"".join([*before, last])).ids) > 10

    def test_a_prompt_that_fills_a_context_is_refused_with_the_members_name(self):
        ensemble = make_ensemble([engine(seed=1), engine(seed=2, context_length=5)])
        assert ensemble.generate("aaa", raw=True, max_tokens=1, seed=0)
        with pytest.raises(PromptTooLongError, match="the prompt has 5 tokens for m1, whose context holds 5"):
            ensemble.generate("aaaa", raw=True)


class TestPrompts:
    def test_a_text_is_a_users_message(self):
        ensemble = wordy()
        said = ensemble.generate("the bird", seed=1, max_tokens=8)
        assert said.text == ensemble.generate([Message("user", "the bird")], seed=1, max_tokens=8).text
        ids = ensemble.members[0].engine.prompts.chat([Message("user", "the bird")])
        assert said.usage.members["m0"].prompt_tokens == len(ids)

    def test_a_raw_text_has_no_template(self):
        ensemble = wordy()
        assert (
            ensemble.generate("the bird", raw=True, max_tokens=1).usage.members["m0"].prompt_tokens
            == 1 + len("the") + 1
        )

    def test_a_system_text_stands_in_front(self):
        ensemble = wordy()
        first = ensemble.generate("x", system="of", seed=1, max_tokens=8)
        second = ensemble.generate([Message("system", "of"), Message("user", "x")], seed=1, max_tokens=8)
        assert first.text == second.text
        assert first.text != ensemble.generate("x", seed=1, max_tokens=8).text

    @pytest.mark.parametrize("options", [{"system": "s"}, {}])
    def test_a_raw_prompt_is_one_text(self, options):
        prompt = "x" if options else [Message("user", "x")]
        with pytest.raises(ConfigError, match="a raw prompt is one text"):
            wordy().generate(prompt, raw=True, **options)

    def test_a_prompt_without_tokens_is_refused(self):
        toy = engine()
        toy.prompts._begin = []
        with pytest.raises(ConfigError, match="the prompt has no tokens for m0"):
            make_ensemble([toy]).generate("", raw=True)


class TestOptions:
    def test_an_unknown_option_is_refused_with_a_near_one(self):
        with pytest.raises(ConfigError, match=r"unknown option 'temprature' .did you mean 'temperature'"):
            wordy().generate("x", temprature=0.5)

    @pytest.mark.parametrize("method", ["mixture", "conventional"])
    def test_temperature_zero_is_for_greedy(self, method):
        with pytest.raises(UnsupportedError, match=f"temperature is 0, and {method} .*method='greedy'"):
            wordy().generate("x", temperature=0, method=method)

    def test_greedy_takes_temperature_zero(self):
        ensemble = wordy()
        assert ensemble.generate("x", temperature=0, method="greedy", max_tokens=4).text == (
            ensemble.generate("x", method="greedy", max_tokens=4).text
        )

    def test_mixing_before_truncating_is_refused_by_mixture_and_another_distribution_in_conventional(self):
        ensemble = toys("piece", 3)
        with pytest.raises(UnsupportedError, match="mixture samples the average"):
            ensemble.generate("ab", method="mixture", mix_then_truncate=True, **RAW)
        completions = [
            ensemble.generate("ab", method="conventional", mix_then_truncate=after, top_k=2, **RAW)
            for after in (False, True)
        ]
        assert completions[0].text != completions[1].text

    def test_penalties_lower_what_was_written(self):
        ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4})])
        options = {"method": "greedy", "raw": True, "max_tokens": 6}
        assert ensemble.generate(" ", **options).text == "aaaaaa"
        assert ensemble.generate(" ", **options, frequency_penalty=1).text == "ababab"
        assert ensemble.generate(" ", **options, presence_penalty=10).text[:2] == "ab"
        assert ensemble.generate(" ", **options, repetition_penalty=100).text[:2] == "ab"
        # Presence and frequency look at the completion, repetition at the prompt too.
        assert ensemble.generate("a", **options, frequency_penalty=1).text == "ababab"
        assert ensemble.generate("a", **options, repetition_penalty=100).text[:1] == "b"

    def test_members_have_options_of_their_own_and_a_calls_go_over_them(self):
        ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4})], sampling=[{"top_k": 1}])
        assert ensemble.generate("a", raw=True, max_tokens=20, seed=0).text == "a" * 20
        assert "b" in ensemble.generate("a", raw=True, max_tokens=20, seed=0, top_k=0).text

    @pytest.mark.parametrize(
        ("weights", "message"), [([1], "1 weight"), ([1, -1], "0 or more"), ([0, 0], "at least one")]
    )
    def test_weights_that_do_not_fit_are_refused(self, weights, message):
        with pytest.raises(ConfigError, match=message):
            wordy(weights=weights)

    def test_no_members_are_refused(self):
        with pytest.raises(ConfigError, match="at least one member"):
            Ensemble([])


class TestUnits:
    def test_the_unit_follows_from_the_vocabularies(self):
        assert toys("token", 2).unit.name == "token"
        assert make_ensemble([engine(SHARED), engine(SHARED, 1)]).unit.name == "token"
        assert make_ensemble([engine(tokens) for tokens in VOCABULARIES[:2]]).unit.name == "piece"
        assert make_ensemble([engine(SHARED)], unit="piece").unit.name == "piece"

    def test_tokens_of_different_vocabularies_do_not_mix(self):
        with pytest.raises(UnsupportedError, match=r"share no vocabulary: \d ids spell different.*unit='piece'"):
            make_ensemble([engine(tokens) for tokens in VOCABULARIES[:2]], unit="token")

    def test_an_unknown_unit_is_refused_with_a_near_one(self):
        with pytest.raises(ConfigError, match=r"unit is 'peice'; .*did you mean 'piece'"):
            make_ensemble([engine()], unit="peice")


class TestTokens:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("unit", ["token", "piece"])
    def test_tokens_join_to_the_text_and_have_the_log_probability_of_their_distribution(self, unit, method):
        ensemble = toys(unit, 3)
        options = OPTIONS["all"] if method != "greedy" else OPTIONS["plain"]
        seen = 0
        for prompt in (" ", "a", "b", "ab c", "c"):
            completion = ensemble.generate(prompt, raw=True, seed=1, method=method, max_tokens=8, **options)
            assert completion.text == "".join(token.text for token in completion.tokens)
            assert completion.text.encode() == b"".join(token.data for token in completion.tokens)
            for place, token in enumerate(completion.tokens):
                pieces = [before.data for before in completion.tokens[:place]]
                author = ensemble.members[ensemble.names.index(token.member)].engine
                sampled_from = ensemble if method in ("conventional", "greedy") else make_ensemble([author], unit=unit)
                distribution = exact_distribution(sampled_from, options, prompt, pieces)
                probability = math.exp(token.logprob)
                # Greedy may have stopped before it asked every member.
                assert probability == pytest.approx(distribution[token.data], rel=1e-9) or (
                    method == "greedy" and probability < distribution[token.data]
                )
                seen += 1
        assert seen > 5

    def test_usage_counts_what_each_member_did(self):
        ensemble = wordy(2)
        completion = ensemble.generate("the bird", seed=4, max_tokens=12)
        usage = completion.usage
        assert usage.tokens == len(completion.tokens)
        assert usage.bytes == len(b"".join(token.data for token in completion.tokens))
        assert sum(member.tokens for member in usage.members.values()) == usage.tokens
        for name, member in usage.members.items():
            assert member.tokens == sum(token.member == name for token in completion.tokens)
        assert sum(member.forwards for member in usage.members.values()) == usage.tokens + (
            completion.finish_reason == "stop"
        )
        assert 0 <= usage.seconds_to_first_token <= usage.seconds

    def test_conventional_runs_every_member_for_every_token(self):
        completion = wordy(3).generate("x", seed=4, max_tokens=5, method="conventional", ignore_end=True)
        assert [member.forwards for member in completion.usage.members.values()] == [5, 5, 5]

    @pytest.mark.parametrize("method", METHODS)
    def test_a_member_of_weight_zero_never_runs(self, method):
        ensemble = wordy(3, weights=[1, 0, 2])
        members = ensemble.generate("x", seed=1, max_tokens=20, method=method, ignore_end=True).usage.members
        assert members["m1"].forwards == members["m1"].tokens == 0
        assert members["m2"].forwards > 0

    def test_an_undrawn_members_catch_up_runs_each_token_once(self):
        completion = toys("token", 2).generate("ab", raw=True, seed=1, max_tokens=30, ignore_end=True)
        for member in completion.usage.members.values():
            assert member.prompt_tokens + member.forwards - 1 <= member.forward_tokens < member.prompt_tokens + 30

    def test_one_engine_can_be_two_members(self):
        toy = engine()
        ensemble = Ensemble([LoadedMember(toy, "a"), LoadedMember(toy, "b", {"top_k": 1})])
        completion = ensemble.generate("ab", **RAW)
        assert {token.member for token in completion.tokens} == {"a", "b"}


class TestStreams:
    def test_a_stream_gives_the_tokens_of_the_completion(self):
        ensemble = toys("piece", 2)
        stream = ensemble.stream("ab", **RAW)
        first = next(stream)
        assert stream.completion.text == first.text
        tokens = [first, *stream]
        assert stream.completion.tokens == tuple(tokens)
        assert stream.completion.text == ensemble.generate("ab", **RAW).text
        with pytest.raises(StopIteration):
            next(stream)

    def test_options_are_refused_before_anything_is_read(self):
        with pytest.raises(ConfigError):
            wordy().stream("x", max_tokens=0)


class TestChat:
    def test_a_conversation_keeps_its_turns(self):
        chat = wordy().chat(seed=5, max_tokens=6)
        first, second = chat.send("the bird"), chat.send("of")
        assert [(message.role, message.content) for message in chat.messages] == [
            ("user", "the bird"),
            ("assistant", first.text),
            ("user", "of"),
            ("assistant", second.text),
        ]

    def test_a_turn_has_noise_of_its_own(self):
        ensemble = wordy()
        chat = ensemble.chat(seed=5, max_tokens=6)
        chat.send("x")
        messages = [*chat.messages, Message("user", "x")]
        assert chat.send("x").text == ensemble.generate(messages, seed=5, sequence=1, max_tokens=6).text

    def test_the_history_is_not_read_again(self):
        chat = wordy(1).chat(seed=5, max_tokens=6, ignore_end=True, stop="\n")
        prompt = chat.send("the bird and the river").usage.members["m0"]
        assert prompt.forward_tokens >= prompt.prompt_tokens
        later = chat.send("x").usage.members["m0"]
        assert later.prompt_tokens > prompt.prompt_tokens + 6
        # The new turn, the completion, and what its re-reading changed.
        assert later.forward_tokens < later.prompt_tokens + 6 - prompt.prompt_tokens

    def test_every_member_reads_a_turn_once_however_late_it_is_sampled(self):
        chat = wordy(2, weights=[1, 1e-12]).chat(seed=5, max_tokens=6, ignore_end=True)
        for _ in range(3):
            assert chat.send("x").usage.members["m1"].forwards == 0

    def test_a_system_text_is_part_of_every_turn_and_not_of_the_history(self):
        ensemble = wordy()
        chat = ensemble.chat(seed=5, max_tokens=4, system="of")
        chat.send("x")
        before = list(chat.messages)
        completion = chat.send("y").text
        assert all(message.role != "system" for message in chat.messages)
        options = {"seed": 5, "sequence": 1, "max_tokens": 4}
        messages = [Message("system", "of"), *before, Message("user", "y")]
        assert completion == ensemble.generate(messages, **options).text

    def test_a_completion_that_is_left_stays_as_far_as_it_was_read(self):
        chat = wordy().chat(seed=5, max_tokens=9, ignore_end=True)
        stream = chat.stream("x")
        read = next(stream).text + next(stream).text
        assert chat.messages[-1] == Message("assistant", read)
        chat.send("y")
        assert chat.messages[1] == Message("assistant", read)
        assert len(chat.messages) == 4

    def test_a_question_that_does_not_fit_stays_out_of_the_history(self):
        toy = ToyEngine(WORD_TOKENS, seed=1, context_length=40)
        chat = make_ensemble([toy]).chat(seed=5, max_tokens=4)
        chat.send("x")
        before = list(chat.messages)
        with pytest.raises(PromptTooLongError):
            chat.send("x" * 60)
        assert chat.messages == before

    def test_options_that_do_not_fit_leave_the_history_as_it_was(self):
        chat = wordy().chat(temperature=0)
        with pytest.raises(UnsupportedError):
            chat.send("x")
        assert chat.messages == []

    def test_an_error_is_always_one_of_mixlms(self):
        for options in ({"raw": True}, {"temprature": 1}, {"max_tokens": 0}):
            with pytest.raises(MixlmError):
                wordy().chat(**options).send("x")


class TestRouters:
    def test_a_router_gives_the_weights_of_every_position(self):
        class Turns:
            """Lets members write in turn, by how much there is."""

            def begin(self, context):
                assert context.text == b"ab"
                return lambda state: np.eye(2)[(state.ids(0).size - state.prompt_length(0)) % 2]

        ensemble = Ensemble([LoadedMember(engine(seed=i), f"m{i}") for i in range(2)], router=Turns())
        completion = ensemble.generate("ab", **RAW)
        assert [token.member for token in completion.tokens] == ["m0", "m1"] * 6


def test_messages_may_be_plain_dictionaries():
    toy = Ensemble([LoadedMember(ToyEngine(seed=1), "toy")])
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    plain = [{"role": message.role, "content": message.content} for message in said]
    assert toy.generate(plain, seed=1, max_tokens=8).text == toy.generate(said, seed=1, max_tokens=8).text


@pytest.mark.parametrize("wrong", [{"role": "robot", "content": "a"}, {"role": "user"}, {"content": "a"}])
def test_what_is_no_message_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"is no message.*role \(system, user, assistant, tool\)"):
        Ensemble([LoadedMember(ToyEngine(), "toy")]).generate([wrong])


def test_other_weights_share_the_engines():
    pair = toys("piece", 2)
    other = pair.with_weights([0, 2])
    assert [member.engine for member in other.members] == [member.engine for member in pair.members]
    assert other.weights.tolist() == [0, 1]
    assert {token.member for token in other.generate("ab", seed=1, max_tokens=30, raw=True).tokens} == {"m1"}
    assert pair.weights.tolist() != [0, 1]
    with pytest.raises(ConfigError, match="3 weights"):
        pair.with_weights([1, 1, 1])


def test_a_generation_that_is_iterated_to_its_end_frees_the_kv_caches() -> None:
    ensemble = toys("token", 2)
    generation = ensemble.stream("ab", raw=True, max_tokens=4, ignore_end=True)
    next(generation)
    assert any(session.num_cached for session in generation.sessions)
    assert len(list(generation)) == 3
    assert not any(session.num_cached for session in generation.sessions)
    assert sum(member.forwards for member in generation.completion.usage.members.values()) == 4
