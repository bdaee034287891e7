"""Names of models: Hugging Face ids, and what to say of a name that is none."""

from __future__ import annotations

import re
from pathlib import Path

from mixlm.errors import ModelNotFoundError, did_you_mean
from mixlm.models.cache import installed
from mixlm.models.catalog import CATALOG

# A name alone is the id of some old models, such as gpt2.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def hub_file(spec: str) -> tuple[str, str] | None:
    """Return the Hugging Face id and the file of `OWNER/NAME/FILE.gguf`, None for anything else."""
    parts = spec.split("/", 2)
    repo = "/".join(parts[:2])
    is_file = len(parts) == 3 and parts[2].lower().endswith(".gguf") and ".." not in parts
    return (repo, parts[2]) if is_file and HUB_ID.fullmatch(repo) else None


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


def find_on_hub(spec: str, path: Path, revision: str | None = None) -> tuple[str, str, bool] | None:
    """Look for a Hugging Face id, first in the local hub cache.

    Args:
        spec: What was named.
        path: The same as a path.
        revision: A branch, tag or commit; by default the main branch.

    Returns:
        Its folder or id, its name, and whether it is local; None for what does not look like an id.

    Raises:
        ModelNotFoundError: The hub has no model of this id for transformers, or does not answer.
    """
    if not HUB_ID.fullmatch(spec):
        return None
    name = spec.rpartition("/")[2]
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return spec, name, False
    config = try_to_load_from_cache(spec, "config.json", revision=revision)
    if isinstance(config, str) and _holds_weights(snapshot := Path(config).parent):
        return str(snapshot), name, True
    # A file, what is almost a known name, or `models/lama` beside a folder `models/llama`, is a slip and no id.
    if path.is_file() or ("/" not in spec and did_you_mean(spec, known_names())):
        return None
    if path.parent.is_dir() and did_you_mean(path.name, entries(path.parent)):
        return None
    check_hub(spec)
    return spec, name, False


def _holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))


def hub_files(spec: str) -> list[str]:
    """Return the files of a model on the hub.

    Raises:
        ModelNotFoundError: The hub has no such model, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    hint = did_you_mean(spec.rpartition("/")[2], known_names())
    try:
        info = HfApi().model_info(spec, timeout=15)
    except RepositoryNotFoundError as error:
        raise not_found(spec, Path(spec), "and the Hugging Face hub has none that you can read", hint) from error
    except HFValidationError as error:
        raise not_found(spec, Path(spec)) from error
    except Exception as error:  # the error of a lost connection depends on the version
        raise not_found(spec, Path(spec), "and the Hugging Face hub does not answer", hint) from error
    return [file.rfilename for file in getattr(info, "siblings", None) or ()]


def entries(folder: Path) -> list[str]:
    """Return what in a folder may be a model: folders and GGUF files."""
    return [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]


def known_names() -> list[str]:
    """Return the names of the catalog's models and of the installed ones."""
    return list(dict.fromkeys([*CATALOG, *(model.name for model in installed())]))


def not_found(spec: str, path: Path, hub: str | None = None, hint: str | None = None) -> ModelNotFoundError:
    """Return the error for a `spec` that names no model, with what was tried.

    Args:
        spec: What was named.
        path: The same as a path.
        hub: What the hub said; None if it was not asked.
        hint: What was probably meant, if that is known.
    """
    known = known_names()
    hint = hint or did_you_mean(spec, known)
    if hint is None and path.parent.is_dir():
        hint = did_you_mean(spec, [str(path.parent / name) for name in entries(path.parent)])
    tried = (
        "no folder, installed model or catalog model has this name"
        if hub
        else "not a folder, a .gguf file or a known name"
    )
    return ModelNotFoundError(
        f"no model {spec!r}: {tried}{f', {hub}' if hub else ''}",
        hint or f"known names: {', '.join(known)}; or give a folder, a .gguf file or a Hugging Face id",
    )
