"""What the files of clients share: each feature runs by itself, and its result is a word."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

URL = sys.argv[1] if len(sys.argv) > 1 else ""
BASE = URL + "/v1"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def check_weather(value: object) -> None:
    """Check arguments or a structure against the schema."""
    fields = json.loads(value) if isinstance(value, str) else value if isinstance(value, dict) else vars(value)
    assert fields["city"] in ("Oslo", "Rome"), fields
    assert 1 <= fields["days"] <= 9, fields


def report(**features: Callable[[], object] | str) -> None:
    """Run features and print their results. A text stands for a feature that the client does not have."""
    results, why = {}, []
    for name, feature in features.items():
        if isinstance(feature, str):
            results[name] = feature
            continue
        for attempt in range(3):  # the toys may sample end-of-text at once
            try:
                feature()
                results[name] = "yes"
                break
            except Exception as error:
                results[name] = "no"
                traceback.print_exc()
                if attempt == 2:
                    why.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    print(json.dumps({**results, "why": "; ".join(why)}))
    sys.stdout.flush()
