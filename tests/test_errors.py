from __future__ import annotations

import inspect

import pytest

from mixlm import errors
from mixlm.errors import MixlmError, UsageError, close_matches, did_you_mean

CLASSES = [error for _, error in inspect.getmembers(errors, inspect.isclass) if error.__module__ == errors.__name__]


def test_every_error_is_drawn_in_the_tree():
    assert len(CLASSES) > 5
    for error in CLASSES:
        assert issubclass(error, MixlmError)
        assert f"{error.__name__} " in errors.__doc__


@pytest.mark.parametrize("error", CLASSES)
def test_what_was_asked_wrongly_exits_with_two_and_the_rest_with_one(error):
    assert error("x").exit_code == (2 if issubclass(error, UsageError) else 1)


def test_an_error_shows_its_message_and_its_hint():
    assert str(MixlmError("no")) == "no"
    assert str(MixlmError("no", "do this")) == "no (do this)"
    assert MixlmError("no", "do this").args == ("no",)


def test_close_names_come_best_first_and_keep_their_case():
    assert close_matches("GREDY", ["mixture", "Greedy"]) == ["Greedy"]
    assert close_matches("top", ["top_p", "top_k", "top_kp", "stop"], limit=2)[0] in ("stop", "top_p", "top_k")
    assert close_matches("zzz", ["mixture"]) == []


def test_a_hint_names_close_matches_or_is_absent():
    assert did_you_mean("mixtur", ["mixture", "single"]) == "did you mean 'mixture'?"
    assert did_you_mean("top_", ["top_k", "top_p"]) in (
        "did you mean 'top_k' or 'top_p'?",
        "did you mean 'top_p' or 'top_k'?",
    )
    assert did_you_mean("zzz", ["mixture"]) is None
