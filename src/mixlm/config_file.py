"""Ensemble files: TOML that is read into the models of `config`, with errors that name file, key and remedy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mixlm.choices import RULES, RULES_WITH_ROLES
from mixlm.config import CombinationConfig, EnsembleConfig, MemberConfig, RouterConfig, SamplingConfig
from mixlm.errors import ConfigError, did_you_mean
from mixlm.types import Sampling

_NO_MODEL = "an ensemble file is text in TOML; a model is named with -m"
_TOML = 'a value follows an equals sign, texts stand in "quotes", and each member stands below a line [[members]]'
_BARE = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false")  # a number, and what is true or not
# Options that are no keys of a file.
_OF_GENERATIONS = ("max_tokens", "min_tokens", "stop", "seed", "draft", "block")


def read_config(path: str | Path) -> EnsembleConfig:
    """Read an ensemble file. Raises ConfigError that names the file, the key and the allowed values."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # a byte-order mark is no text
    except FileNotFoundError:
        names = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names) or _NO_MODEL
        raise ConfigError(f"there is no ensemble file {path}", hint) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}", _NO_MODEL) from error
    except UnicodeDecodeError as error:
        hint = _NO_MODEL if path.suffix.lower() != ".toml" else "save it as UTF-8"
        raise ConfigError(f"{path}{_line_of(error)}: it is not UTF-8 ({error.reason})", hint) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", _TOML) from error
    config = parse_config(raw, str(path))
    _check_roles(config, str(path))
    folder = path.resolve().parent
    update: dict[str, Any] = {"members": tuple(_resolve_files(member, folder, path) for member in config.members)}
    for member, resolved in zip(config.members, update["members"], strict=True):
        place = "template" if member.template_file is None else f"template_file {member.template_file}"
        _check_template(resolved.template, f"{path}: {place} of member {member.name or member.model}")
    if config.router.file is not None:
        update["router"] = config.router.model_copy(update={"file": str(folder / config.router.file)})
    if config.combination is not None and config.combination.accept is not None:
        accept = str(folder / config.combination.accept)
        update["combination"] = config.combination.model_copy(update={"accept": accept})
    return config.model_copy(update=update)


def write_config(config: EnsembleConfig, path: str | Path) -> None:
    """Write an ensemble file that `read_config` reads back; default values are omitted."""
    import tomli_w

    form = config.model_dump(exclude_none=True, exclude_defaults=True)
    Path(path).write_text(tomli_w.dumps(form, multiline_strings=True), encoding="utf-8")


def parse_config(raw: dict[str, Any], source: str | None) -> EnsembleConfig:
    """Validate a parsed ensemble file, or keywords in that form.

    Args:
        raw: Its tables.
        source: The file's name, for messages; None for keywords, which messages name without their tables.

    Raises:
        ConfigError: It is not valid.
    """
    _check_tables(raw, source)
    try:
        config = EnsembleConfig.model_validate(raw)
    except ValidationError as error:
        raise _config_error(error, source) from error
    config.weights()
    if (config.router.kind == "learned") != (config.router.file is not None):
        raise ConfigError(f"{source}: a learned router has a file, and no other kind has one", "see mixlm fit --router")
    for sampling in (config.sampling, *(member.sampling for member in config.members)):
        Sampling(**sampling.options())
    return config


def _check_roles(config: EnsembleConfig, source: str) -> None:
    """Raise ConfigError for a role in a file whose rule has none."""
    rule = None if config.combination is None else config.combination.rule
    for i, member in enumerate(config.members):
        if member.role is not None and rule is not None and rule not in RULES_WITH_ROLES:
            raise ConfigError(
                f"{source}: members.{i}.role is {member.role!r}, and rule {rule} has no roles", "leave it out"
            )


def _resolve_files(member: MemberConfig, folder: Path, source: Path) -> MemberConfig:
    """Read a member's template file, and resolve paths relative to the ensemble file."""
    changes: dict[str, Any] = {}
    if member.template_file is not None:
        name = member.name or member.model
        if member.template is not None:
            raise ConfigError(f"{source}: member {name} has a template and a template_file", "give one of them")
        place = f"{source}: template_file {member.template_file} of member {name}"
        try:
            changes["template"] = (folder / member.template_file).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(
                f"{place} cannot be read: {error.strerror or error}", f"its path begins at the folder {folder}"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{place}{_line_of(error)}: it is not UTF-8 ({error.reason})", "save it as UTF-8"
            ) from error
    for key, value in (("model", member.model), ("adapter", member.adapter), ("tokenizer", member.tokenizer)):
        if value is not None and (folder / value).exists():
            changes[key] = str(folder / value)
    return member.model_copy(update=changes)


def _line_of(error: UnicodeDecodeError) -> str:
    line = error.object[: error.start].count(b"\n") + 1
    return f", line {line}"


def _config_error(error: ValidationError, source: str | None) -> ConfigError:
    """Return the first of pydantic's errors as one sentence and a hint."""
    first = error.errors()[0]
    if first["type"] == "missing":  # perhaps it has another name
        others = (other for other in error.errors() if other["loc"][:-1] == first["loc"][:-1])
        first = next((other for other in others if other["type"] == "extra_forbidden"), first)
    # The names of a union's branches, such as dict[str,…], come after its field.
    parts = [str(part) for i, part in enumerate(first["loc"]) if not (i and _is_branch(str(part)))]
    if source is None:
        parts = [part for part in parts if part not in ("members", "sampling", "combination") and not part.isdecimal()]
    source, place = "" if source is None else f"{source}: ", ".".join(parts)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{source}unknown key {place!r}", _key_hint(first["loc"]))
    if first["type"] == "missing":
        lists = "an ensemble file lists its [[members]], each with a model"
        named = f"name one, such as rule = {RULES[1]!r}"
        return ConfigError(f"{source}{place} is missing", named if place == "combination.rule" else lists)
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = "" if isinstance(first["input"], dict | list) else f" is {first['input']!r}"
    hint = _value_hint(first["type"], first["input"], message, parts[-1] if parts else "")
    return ConfigError(f"{source}{place}{shown}: {message}" if place else f"{source}{message}", hint)


def _value_hint(kind: str, value: Any, message: str, key: str) -> str | None:
    """Return what to do about a value that is not allowed, None where the message says it all.

    Args:
        kind: Of the error, as pydantic names it.
        value: What was found.
        message: What is allowed.
        key: Whose value it is.
    """
    if isinstance(value, str) and re.search("number|integer|boolean", message) and _BARE.fullmatch(value):
        return "write it without quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return "write it in quotes"
    if kind == "model_type":
        return f"write [{key}], and its keys below"
    if kind == "literal_error":
        return did_you_mean(str(value), re.findall("'([^']+)'", message))
    return None


def _is_branch(part: str) -> bool:
    return part in ("str", "int") or part.startswith("dict[")


def _check_tables(raw: dict[str, Any], source: str | None) -> None:
    """Raise ConfigError for a table where a list of tables belongs, or the reverse."""
    members = raw.get("members", [])
    if isinstance(members, dict):
        raise ConfigError(f"{source}: [members] is one table, and members are a list of them", "write [[members]]")
    if not isinstance(members, list | tuple) or not all(isinstance(member, dict) for member in members):
        shape = "a list of names, and must be one" if isinstance(members, list) else f"{members!r}, and must be a list"
        raise ConfigError(
            f"{source}: members is {shape} of tables", 'write [[members]] for each, and below it: model = "NAME"'
        )
    owners = [("", raw), *((f"members.{i}.", member) for i, member in enumerate(members))]
    for prefix, table in owners:
        for key in ("sampling", "router", "combination"):
            if isinstance(table.get(key), list):
                place = f"{prefix.split('.')[0]}.{key}" if prefix else key
                raise ConfigError(f"{source}: {prefix}{key} is a list of tables, and must be one", f"write [{place}]")


def _check_template(template: str | None, place: str) -> None:
    """Raise ConfigError for a chat template that is not valid Jinja."""
    if template is None:
        return
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:  # then no engine that uses templates is installed
        return
    try:
        # transformers adds a tag of its own, which marks what an assistant says.
        # Compiled and not only parsed: that finds unknown filters too.
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).compile(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{place}, line {error.lineno}: {error.message}", "it must be a valid Jinja template"
        ) from error


def _key_hint(place: tuple[int | str, ...]) -> str:
    """Return what to do about an unknown key: where it belongs, or what was probably meant."""
    name, model = str(place[-1]), _model_at(place)
    is_top, singular = model is EnsembleConfig, name.removesuffix("s")
    belongs = (
        (
            model is not SamplingConfig and name in SamplingConfig.model_fields,
            f"it is a sampling option: write it below [{'members.' if model is MemberConfig else ''}sampling]",
        ),
        (
            not is_top and name in EnsembleConfig.model_fields,
            "it is a key of the ensemble: write it above the first [table] of the file",
        ),
        (
            is_top and name in CombinationConfig.model_fields,
            "it is a parameter of a rule: write it below [combination]",
        ),
        (is_top and singular in ("member", "model"), 'write [[members]] for each, and below it: model = "NAME"'),
        (
            is_top and singular in MemberConfig.model_fields,
            f"{singular} is a key of each member: write it below [[members]]",
        ),
        (
            name in _OF_GENERATIONS,
            f"it is an option of each generation: --{name.replace('_', '-')}, or {name}=… in Python",
        ),
        (model is MemberConfig and name in ("path", "id", "file"), "did you mean 'model'?"),
    )
    known = list(model.model_fields)
    hint = next((hint for applies, hint in belongs if applies), None) or did_you_mean(name, known)
    return hint or f"known keys: {', '.join(known)}"


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    if "sampling" in place[:-1]:
        return SamplingConfig
    if "router" in place[:-1]:
        return RouterConfig
    if "combination" in place[:-1]:
        return CombinationConfig
    return MemberConfig if len(place) > 1 and place[0] == "members" else EnsembleConfig
