"""Find the model that a user names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixlm.errors import ModelNotFoundError
from mixlm.models.cache import find, is_converted
from mixlm.models.catalog import CATALOG

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
    local: bool  # False if loading it downloads it
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
        if not path.is_file() and not path.parent.is_dir():
            from mixlm.models.hub import hub_file

            if hub_file(spec) is not None:
                raise ModelNotFoundError(
                    f"there is no file {spec} here; a file of the Hugging Face hub is fetched first",
                    f"mixlm models get {spec}",
                )
        from mixlm.models.convert import converted

        return ResolvedModel(str(converted(path, dtype)), path.stem, local=True)
    if installed_model is None and spec in CATALOG:
        raise ModelNotFoundError(f"the model {spec!r} is not installed", f"mixlm models get {spec}")
    if installed_model:
        folder = installed_model.path
        if not is_converted(folder):
            from mixlm.models.convert import ensure_tokenizer, ensure_weights

            folder = ensure_tokenizer(ensure_weights(folder))
        return ResolvedModel(str(folder), installed_model.name, local=True)
    from mixlm.models.hub import find_on_hub, not_found

    model = find_on_hub(spec, path, revision)
    if model is None:
        raise not_found(spec, path)
    return ResolvedModel(*model, on_hub=True)


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
    return ResolvedModel(str(path), path.name, local=True)
