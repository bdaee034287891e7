"""API keys. Only their SHA-256 is kept, and comparing takes equally long whatever is presented.

A key should be long and random; then its plain hash is as good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mixlm.errors import ConfigError

VARIABLE = "MIXLM_API_KEYS"
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<hash>[0-9a-f]{64})")
_SHORTEST = 16


@dataclass(frozen=True)
class Keys:
    """Who may ask. names: each key's name by its hash. None at all: anyone may."""

    names: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names)

    def holder(self, presented: str) -> str | None:
        """Return the name of a key, or None for one that is not known."""
        digest = hashed(presented)
        found = None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def hashed(key: str) -> str:
    """Return a key's SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Read the keys of a file, a name and a SHA-256 a line, and of the environment, plain with commas between them.

    Raises ConfigError for a file without keys, and for a line that is something else, which it does not repeat: it may
    be a key. So may a short one.
    """
    names: dict[str, str] = {}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the file of keys {path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise ConfigError(
                    f"line {number} of {path} is not a name and a SHA-256", "such as: ada $(printf %s KEY | sha256sum)"
                )
            names[found["hash"]] = found["name"]
        if not names:
            raise ConfigError(f"{path} holds no keys", "a line is a name and the SHA-256 of a key")
    for number, key in enumerate(filter(None, environment.get(VARIABLE, "").split(",")), 1):
        if len(key) < _SHORTEST:
            raise ConfigError(f"key {number} in {VARIABLE} has less than {_SHORTEST} characters", "take a random one")
        names[hashed(key)] = f"key-{number}"
    return Keys(names)
