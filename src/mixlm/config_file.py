"""Ensemble files: TOML that is read into the models of `config`, with errors that name file, key and remedy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from mixlm.choices import RULES_WITH_ROLES
from mixlm.config import EnsembleConfig, MemberConfig, parse_config
from mixlm.errors import ConfigError, did_you_mean

_NO_MODEL = "an ensemble file is text in TOML; a model is named with -m"
_UTF8 = "save it as UTF-8"
_TOML = 'a value follows an equals sign, texts stand in "quotes", and each member stands below a line [[members]]'


def read_config(path: str | Path) -> EnsembleConfig:
    """Read an ensemble file. Raises ConfigError that names the file, the key and the allowed values."""
    path = Path(path)
    try:
        text = _read(path, str(path), _NO_MODEL, _UTF8 if path.suffix.lower() == ".toml" else _NO_MODEL)
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        names = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no ensemble file {path}", did_you_mean(path.name, names) or _NO_MODEL) from None
    try:
        raw = tomllib.loads(text)
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
        hint = f"its path begins at the folder {folder}"
        changes["template"] = _read(folder / member.template_file, place, hint, _UTF8)
    for key, value in (("model", member.model), ("adapter", member.adapter), ("tokenizer", member.tokenizer)):
        if value and (folder / value).exists():
            changes[key] = str(folder / value)
    return member.model_copy(update=changes)


def _read(path: Path, place: str, hint: str, form_hint: str) -> str:
    """Return the text of a file. Raises ConfigError, which calls it `place`, where it is not readable or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or error}", hint) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{place}, line {line}: it is not UTF-8 ({error.reason})", form_hint) from error


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
