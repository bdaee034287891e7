"""Objects of a JSON schema whose names are limited by several schemas together: by allOf, anyOf, oneOf and $ref.

llguidance joins such schemas when it compiles one, and reports nothing of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from typing import Any
from urllib.parse import unquote

from mixlm.errors import ConfigError

Parts = tuple[Mapping[str, Any], ...]  # schemas that hold for one value
# Choices among the alternatives of one object, their parts, and schemas of the values in all objects.
_MAX_FORMS = 1000
_MAX_PARTS = 10_000
_MAX_CHILDREN = 100_000
_OBJECT_KEYS = ("properties", "patternProperties", "additionalProperties", "required")
_ARRAY_KEYS = ("items", "prefixItems", "additionalItems")


@dataclass(frozen=True)
class LimitedObject:
    """An object that may have some names of its own and others that match patterns.

    names: those in `properties` and `required`. patterns: those in `patternProperties`. others: a schema of such
    objects with at least one property, and none of `names`.
    """

    names: list[str]
    patterns: list[str]
    others: Mapping[str, Any]


def limited_objects(root: Any) -> Iterator[LimitedObject]:
    """Yield every object of a schema that has names, patterns, and a limit on additional properties.

    Alternatives (anyOf, oneOf) give an object each.

    Raises:
        ConfigError: There are too many.
    """
    schemas = _JoinedSchemas(root)
    waiting: list[tuple[Any, ...]] = [(root,)]
    known: set[frozenset[int]] = set()
    count = 0
    while waiting:
        joined = waiting.pop()
        key = frozenset(map(id, joined))
        if key in known:
            continue
        known.add(key)
        for parts in _choices([schemas.forms(schema) for schema in joined]):
            names, patterns = _names(parts), _patterns(parts)
            if names and patterns and any(_others(part) not in (True, {}) for part in parts):
                others = {"allOf": [_without_names(part) for part in parts], "type": "object", "minProperties": 1}
                yield LimitedObject(names, patterns, others)
            for child in _children(parts):
                waiting.append(child)
                count += len(child)
                if count > _MAX_CHILDREN:
                    raise _too_many()


class _JoinedSchemas:
    """What each schema of a whole one says of a value, together with all that it joins."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, list[Parts]] = {}
        self._named: dict[int, dict[str, Any]] = {}

    def forms(self, schema: Any) -> list[Parts]:
        """Return the parts of a schema for each choice among its alternatives. Raises ConfigError for too many."""
        waiting: list[tuple[Any, list[list[Any]] | None]] = [(schema, None)]
        while waiting:
            part, groups = waiting.pop()
            if groups is not None:  # which are known by now
                own = (part,) if any(key in part for key in (*_OBJECT_KEYS, *_ARRAY_KEYS)) else ()
                options = [_once(chain.from_iterable(map(self._forms, group))) for group in groups]
                self._known[id(part)] = _choices([[own], *options])
            elif isinstance(part, dict) and id(part) not in self._known:
                self._known[id(part)] = [()]  # where it joins itself
                groups = self._joined(part)
                waiting.append((part, groups))
                waiting += [(other, None) for other in chain.from_iterable(groups)][::-1]
        return self._forms(schema)

    def _forms(self, schema: Any) -> list[Parts]:
        if isinstance(schema, dict):
            return self._known[id(schema)]
        return [] if schema is False else [()]

    def _joined(self, schema: Mapping[str, Any]) -> list[list[Any]]:
        """Return the groups of schemas that a schema joins: one of each group holds, besides its own keys."""
        groups = [[part] for part in _list(schema, "allOf")]
        groups += [_list(schema, key) for key in ("anyOf", "oneOf") if key in schema]
        if isinstance(schema.get("$ref"), str):
            groups.append([self._resolve(schema["$ref"])])
        return groups

    def _resolve(self, reference: str) -> Any:
        """Return the schema that a reference names; True, which says nothing, where it is not found."""
        address, _, fragment = reference.partition("#")
        place = self._names(self._root).get(address, True) if address else self._root
        if not fragment.startswith("/"):
            return self._names(place).get(f"#{fragment}", True) if fragment else place
        for step in unquote(fragment)[1:].split("/"):
            if isinstance(place, list):
                place = place[int(step)] if step.isdecimal() and int(step) < len(place) else True
            else:
                place = place.get(step.replace("~1", "/").replace("~0", "~"), True) if isinstance(place, dict) else True
        return place

    def _names(self, schema: Any) -> Mapping[str, Any]:
        """Return the first JSON object in a schema with each `$id`, and with each `$anchor` after a #."""
        if id(schema) not in self._named:
            self._named[id(schema)] = names = dict[str, Any]()
            for node in _nodes(schema):
                for key in ("$id", "id", "$anchor"):
                    if isinstance(name := node.get(key), str):
                        names.setdefault(f"#{name}" if key == "$anchor" else name, node)
        return self._named[id(schema)]


def _choices(groups: Sequence[Sequence[Parts]]) -> list[Parts]:
    """Return the parts of each choice of one form a group. Raises ConfigError for too many."""
    choices = list(islice(product(*groups), _MAX_FORMS + 1))
    if len(choices) > _MAX_FORMS or sum(map(len, chain.from_iterable(choices))) > _MAX_PARTS:
        raise _too_many()
    return _once({id(part): part for part in chain(*choice)}.values() for choice in choices)


def _once(forms: Iterable[Iterable[Mapping[str, Any]]]) -> list[Parts]:
    """Return equal forms once."""
    return list({tuple(map(id, form)): form for form in map(tuple, forms)}.values())


def _too_many() -> ConfigError:
    return ConfigError(
        "json_schema has patternProperties among too many alternatives of allOf, anyOf, oneOf and $ref",
        "leave patternProperties out, or use fewer alternatives",
    )


def _names(parts: Parts) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(_own_names(part) for part in parts)))


def _patterns(parts: Parts) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(_mapping(part, "patternProperties") for part in parts)))


def _without_names(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part that forbids its names. Of the schemas of other values, the types are left."""
    out: dict[str, Any] = {
        "properties": dict.fromkeys(_own_names(part), False),
        "patternProperties": {name: _type(value) for name, value in _mapping(part, "patternProperties").items()},
    }
    if "additionalProperties" in part:
        out["additionalProperties"] = _type(part["additionalProperties"])
    return out


def _type(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    return {"type": schema["type"]} if "type" in schema else True


def _children(parts: Parts) -> Iterator[tuple[Any, ...]]:
    """Yield the schemas that hold for each value inside an object or an array."""
    for name in _names(parts):
        yield tuple(_mapping(part, "properties").get(name, _others(part)) for part in parts)
    for pattern in _patterns(parts):
        yield tuple(_mapping(part, "patternProperties").get(pattern, _others(part)) for part in parts)
    for key in ("additionalProperties", "items", "additionalItems"):
        yield tuple(part.get(key, True) for part in parts)
    for part in parts:
        for item in (*_list(part, "prefixItems"), *_list(part, "items")):
            yield (item,)


def _others(part: Mapping[str, Any]) -> Any:
    return part.get("additionalProperties", True)


def _own_names(part: Mapping[str, Any]) -> list[str]:
    return [*_mapping(part, "properties"), *(name for name in _list(part, "required") if isinstance(name, str))]


def _mapping(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = schema.get(key)
    return value if isinstance(value, dict) else {}


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every JSON object in a schema, in the order of the text."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += reversed(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
