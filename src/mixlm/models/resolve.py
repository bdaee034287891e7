"""Find the model that a user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixlm.errors import ModelNotFoundError, did_you_mean
from mixlm.models.cache import find
from mixlm.models.catalog import CATALOG
from mixlm.models.hub import HUB_ID, check_hub, entries, hub_file, known_names, not_found
from mixlm.terminal import ProgressDisplay


@dataclass(frozen=True)
class ResolvedModel:
    """A model that can be loaded."""

    path_or_id: str  # a folder, or a Hugging Face id
    name: str  # short, for display
    local: bool  # False if loading it downloads it


def resolve(
    spec: str, dtype: str = "bfloat16", *, fetch: bool = False, display: ProgressDisplay | None = None
) -> ResolvedModel:
    """Find the model that `spec` names.

    Args:
        spec: A folder, a `.gguf` file, a name in the catalog or the cache, or a Hugging Face id, tried in this order.
        dtype: The dtype to which a GGUF file is converted.
        fetch: Whether to fetch a catalog model that is not installed.
        display: Shows the progress of conversions and downloads; on stderr by default.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelLoadError: A GGUF file cannot be converted.
    """
    if not spec.strip():
        raise ModelNotFoundError("the model's name is empty", "give a folder, a .gguf file or the name of a model")
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
        if not path.is_file() and hub_file(spec) is not None and not path.parent.is_dir():
            raise ModelNotFoundError(
                f"there is no file {spec} here; a file of the Hugging Face hub is fetched first",
                f"mixlm models get {spec}",
            )
        from mixlm.models.convert import converted

        return ResolvedModel(str(converted(path, dtype, display)), path.stem, local=True)
    if installed_model is None and spec in CATALOG:
        if not fetch:
            raise ModelNotFoundError(f"the model {spec!r} is not installed", f"mixlm models get {spec}")
        from mixlm.models.fetch import get

        installed_model = get(spec, display)[0]
    if installed_model:
        from mixlm.models.convert import with_tokenizer, with_weights

        return ResolvedModel(
            str(with_tokenizer(with_weights(installed_model.path, display))), installed_model.name, local=True
        )
    if hub := _from_hub(spec, path):
        return hub
    raise not_found(spec, path)


def _folder(path: Path) -> ResolvedModel:
    path = path.absolute().resolve()
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"it contains {', '.join(files[:3])}: give the path of that file" if files else "give the folder of a model"
        )
        raise ModelNotFoundError(f"the folder {path} is not a model: it lacks config.json", hint)
    return ResolvedModel(str(path), path.name, local=True)


def _from_hub(spec: str, path: Path) -> ResolvedModel | None:
    """Look for `spec` as a Hugging Face id, first in the local hub cache; None if it does not look like one."""
    if not HUB_ID.fullmatch(spec):
        return None
    name = spec.rpartition("/")[2]
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ResolvedModel(spec, name, local=False)
    config = try_to_load_from_cache(spec, "config.json")
    if isinstance(config, str) and (snapshot := Path(config).parent) and _holds_weights(snapshot):
        return ResolvedModel(str(snapshot), name, local=True)
    # What is almost a known name, or `models/lama` next to a folder `models/llama`, is a slip rather than an id.
    if "/" not in spec and did_you_mean(spec, known_names()):
        return None
    if path.parent.is_dir() and did_you_mean(path.name, entries(path.parent)):
        return None
    check_hub(spec)
    return ResolvedModel(spec, name, local=False)


def _holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))
