"""The example of docs/combinations.md, and that the page names every rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from adversary import random_rows, random_weights
from bounds import check_bounds

from mixlm.core.combinations import COMBINATIONS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "combinations.md").read_text(encoding="utf-8")


def test_the_page_names_every_rule():
    assert [name for name in COMBINATIONS if f"`{name}`" not in PAGE] == []


def test_the_example_is_a_rule_with_a_valid_bound():
    namespace: dict = {}
    exec(PAGE.split("```python\n")[1].split("```")[0], namespace)
    rng = np.random.default_rng(0)
    for _ in range(30):
        members = int(rng.choice([2, 3]))
        check_bounds(namespace["rule"], random_rows(rng, members, 6), random_weights(rng, members))
