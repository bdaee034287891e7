"""API keys. The server keeps only their SHA-256, and compares in constant time.

Keys should be long and random; a plain hash is then as good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from mixlm.errors import ConfigError

VARIABLE = "MIXLM_API_KEYS"
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<hash>[0-9a-f]{64})")
_MIN_LENGTH = 16


def key_holder(keys: Mapping[str, str], key: str) -> str | None:
    """Return the name of a key, or None for an unknown key. keys: names by the hashes of accepted keys."""
    digest = hash_key(key)
    holders = [name for known, name in keys.items() if hmac.compare_digest(known, digest)]
    return holders[0] if holders else None


def hash_key(key: str) -> str:
    """Return a key's SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def load_api_keys(path: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the accepted keys by their hashes, from a file and from the environment.

    Args:
        path: A file whose lines are a name and a SHA-256; empty lines and lines that begin with # are skipped.
        environment: `MIXLM_API_KEYS` may hold plain keys, separated by commas.

    Raises:
        ConfigError: The file has no keys or an invalid line, or a key is too short. The message does not repeat the
            line, which may be a key.
    """
    names: dict[str, str] = {}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file {path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise ConfigError(
                    f"line {number} of {path} is not a name and a SHA-256", "such as: ada $(printf %s KEY | sha256sum)"
                )
            names[match["hash"]] = match["name"]
        if not names:
            raise ConfigError(f"{path} holds no keys", "a line is a name and the SHA-256 of a key")
    for number, key in enumerate(filter(None, environment.get(VARIABLE, "").split(",")), 1):
        if len(key) < _MIN_LENGTH:
            raise ConfigError(f"key {number} in {VARIABLE} has less than {_MIN_LENGTH} characters", "take a random one")
        names[hash_key(key)] = f"key-{number}"
    return names
