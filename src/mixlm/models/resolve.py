"""Find the model that a user names: a folder, a file, a name of the catalog or the cache, or a Hugging Face id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixlm.errors import ModelNotFoundError, did_you_mean
from mixlm.models.cache import find, installed, is_converted
from mixlm.models.catalog import CATALOG

# A name alone is the id of some old models, such as gpt2.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# The address of a model on the Hugging Face hub, or of a GGUF file there.
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob)/[^/]+/([^?#]+\.gguf))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ResolvedModel:
    """A model that can be loaded."""

    path_or_id: str  # a folder, or a Hugging Face id
    name: str  # short, for display
    local: bool = True  # False if loading it downloads it
    on_hub: bool = False  # whether it is a Hugging Face id


def resolve(spec: str, dtype: str = "bfloat16", revision: str | None = None) -> ResolvedModel:
    """Find the model that `spec` names.

    Args:
        spec: A folder, a `.gguf` file, a name in the catalog or the cache, or a Hugging Face id, tried in this order.
        dtype: The dtype to which a GGUF file is converted.
        revision: Of a Hugging Face id: a branch, tag or commit.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelLoadError: A GGUF file cannot be converted.
    """
    if not spec.strip():
        raise ModelNotFoundError("the model's name is empty", "give a folder, a .gguf file or the name of a model")
    check_no_page(spec)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".toml":
        raise ModelNotFoundError(
            f"{spec} is an ensemble file, not a model", "it is loaded by itself, in place of models"
        )
    installed_model = find(spec)
    # A folder without a model does not hide a known model of the same name.
    if path.is_dir() and ((path / "config.json").is_file() or not (installed_model or spec in CATALOG)):
        return _folder(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file() and not path.parent.is_dir() and hub_file(spec) is not None:
            raise ModelNotFoundError(
                f"there is no file {spec} here; a file of the Hugging Face hub is fetched first",
                f"mixlm models get {spec}",
            )
        from mixlm.models.gguf import converted

        return ResolvedModel(str(converted(path, dtype)), path.stem)
    if installed_model is None and spec in CATALOG:
        raise ModelNotFoundError(f"the model {spec!r} is not installed", f"mixlm models get {spec}")
    if installed_model:
        folder = installed_model.path
        if not is_converted(folder):
            from mixlm.models.gguf import ensure_tokenizer, ensure_weights

            folder = ensure_tokenizer(ensure_weights(folder))
        return ResolvedModel(str(folder), installed_model.name)
    model = _on_hub(spec, path, revision)
    if model is None:
        raise _not_found(spec)
    return model


def check_no_page(spec: str) -> None:
    """Raise ModelNotFoundError for the address of a page of the Hugging Face hub, with the id that it shows."""
    if (page := _PAGE.match(spec)) is not None and not Path(spec).exists():
        model, file = page.groups()
        hint = f"name the model by its id: {model}" if file is None else f"mixlm models get {model}/{file}"
        raise ModelNotFoundError(f"{spec} is a page of the Hugging Face hub, and no model", hint)


def _folder(path: Path) -> ResolvedModel:
    path = path.absolute().resolve()
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"it contains {', '.join(files[:3])}: give the path of that file" if files else "give the folder of a model"
        )
        raise ModelNotFoundError(f"the folder {path} is not a model: it lacks config.json", hint)
    return ResolvedModel(str(path), path.name)


def hub_file(spec: str) -> tuple[str, str] | None:
    """Return the Hugging Face id and the file of `OWNER/NAME/FILE.gguf`, None for anything else."""
    parts = spec.split("/", 2)
    repo = "/".join(parts[:2])
    is_file = len(parts) == 3 and parts[2].lower().endswith(".gguf") and ".." not in parts
    return (repo, parts[2]) if is_file and _HUB_ID.fullmatch(repo) else None


def check_hub(spec: str) -> None:
    """Check once that the hub has a model for transformers, since loading from it would retry many times.

    Raises:
        ModelNotFoundError: It has not, or does not answer.
    """
    files = hub_files(spec)
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    if ggufs and "config.json" not in files:
        raise ModelNotFoundError(
            f"{spec} on the Hugging Face hub has GGUF files only: {', '.join(ggufs[:8])}",
            f"fetch one of them, such as: mixlm models get {spec}/{ggufs[0]}",
        )


def _on_hub(spec: str, path: Path, revision: str | None) -> ResolvedModel | None:
    """Return the model of a Hugging Face id, from the local hub cache if it is there; None for what is no id.

    Raises:
        ModelNotFoundError: The hub has no model of this id for transformers, or does not answer.
    """
    if not _HUB_ID.fullmatch(spec):
        return None
    name = spec.rpartition("/")[2]
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ResolvedModel(spec, name, local=False, on_hub=True)
    config = try_to_load_from_cache(spec, "config.json", revision=revision)
    if isinstance(config, str):
        snapshot = Path(config).parent
        if any(next(snapshot.glob(pattern), None) for pattern in ("*.safetensors", "*.bin")):
            return ResolvedModel(str(snapshot), name, on_hub=True)
    # A file, what is almost a known name, or `models/lama` beside a folder `models/llama`, is a slip and no id.
    if path.is_file() or ("/" not in spec and did_you_mean(spec, _known_names())):
        return None
    if path.parent.is_dir() and did_you_mean(path.name, _entries(path.parent)):
        return None
    check_hub(spec)
    return ResolvedModel(spec, name, local=False, on_hub=True)


def hub_files(spec: str) -> list[str]:
    """Return the files of a model on the hub.

    Raises:
        ModelNotFoundError: The hub has no such model, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(spec, timeout=15)
    except RepositoryNotFoundError as error:
        raise _not_found(spec, "and the Hugging Face hub has none that you can read") from error
    except HFValidationError as error:
        raise _not_found(spec) from error
    except Exception as error:  # the error of a lost connection depends on the version
        raise _not_found(spec, "and the Hugging Face hub does not answer") from error
    return [file.rfilename for file in getattr(info, "siblings", None) or ()]


def _entries(folder: Path) -> list[str]:
    """Return what in a folder may be a model: folders and GGUF files."""
    return [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]


def _known_names() -> list[str]:
    """Return the names of the catalog's models and of the installed ones."""
    return list(dict.fromkeys([*CATALOG, *(model.name for model in installed())]))


def _not_found(spec: str, hub: str | None = None) -> ModelNotFoundError:
    """Return the error for a `spec` that names no model. hub: what the hub said; None if it was not asked."""
    known, parent = _known_names(), Path(spec).expanduser().parent
    hint = (hub and did_you_mean(spec.rpartition("/")[2], known)) or did_you_mean(spec, known)
    if hint is None and parent.is_dir():
        hint = did_you_mean(spec, [str(parent / name) for name in _entries(parent)])
    tried = f"no folder, installed model or catalog model has this name, {hub}"
    return ModelNotFoundError(
        f"no model {spec!r}: {tried if hub else 'not a folder, a .gguf file or a known name'}",
        hint or f"known names: {', '.join(known)}; or give a folder, a .gguf file or a Hugging Face id",
    )
