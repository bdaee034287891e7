"""From what a user writes for a model to something that can be loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixlm.errors import ModelNotFoundError, did_you_mean
from mixlm.models.cache import find, installed
from mixlm.models.catalog import CATALOG
from mixlm.models.convert import check_dtype, converted, with_tokenizer, with_weights
from mixlm.models.fetch import get
from mixlm.terminal import ProgressDisplay

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that can be loaded."""

    path_or_id: str  # a folder, or a Hugging Face id
    name: str  # short, for display
    local: bool  # False: loading it downloads it first


def resolve(
    spec: str, dtype: str = "bfloat16", *, fetch: bool = False, display: ProgressDisplay | None = None
) -> ResolvedModel:
    """Find the model that `spec` stands for.

    `spec` is tried as a folder, a `.gguf` file, a catalog name, a name in the cache, and a Hugging Face id, in this
    order.

    Args:
        spec: what the user wrote.
        dtype: what a GGUF file is converted to, the first time.
        fetch: fetch a catalog model that is not installed, instead of an error.
        display: where conversions and downloads show their progress; stderr when left out.

    Raises:
        ModelNotFoundError: nothing fits.
        ModelLoadError: a GGUF file that cannot be converted.
    """
    check_dtype(dtype)
    if not spec.strip():
        raise ModelNotFoundError("the model's name is empty", "give a folder, a .gguf file or a model's name")
    path = Path(spec).expanduser()
    named = find(spec)
    # A folder that only happens to be called like a known model does not hide that model.
    if path.is_dir() and ((path / "config.json").is_file() or not (named or spec in CATALOG)):
        return _folder(path)
    if path.suffix.lower() == ".gguf":
        return ResolvedModel(str(converted(path, dtype, display)), path.stem, local=True)
    if named is None and spec in CATALOG:
        if not fetch:
            raise ModelNotFoundError(f"the model {spec!r} is not installed", f"mixlm models get {spec}")
        named = get(spec, display)[0]
    if named:
        return ResolvedModel(str(with_tokenizer(with_weights(named.path, display))), named.name, local=True)
    if hub := _from_hub(spec, path):
        return hub
    raise _not_found(spec, path)


def _folder(path: Path) -> ResolvedModel:
    path = path.absolute().resolve()
    if not (path / "config.json").is_file():
        files = sorted(one.name for one in path.glob("*.gguf"))
        hint = f"it holds {', '.join(files[:3])}: give that file's path" if files else "a model's folder has one"
        raise ModelNotFoundError(f"the folder {path} is no model: it lacks config.json", hint)
    return ResolvedModel(str(path), path.name, local=True)


def _from_hub(spec: str, path: Path) -> ResolvedModel | None:
    """Take `spec` for a Hugging Face id, in the local hub cache first; None when it does not look like one."""
    if not _HUB_ID.fullmatch(spec):
        return None
    name = spec.rpartition("/")[2]
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ResolvedModel(spec, name, local=False)
    config = try_to_load_from_cache(spec, "config.json")
    if isinstance(config, str) and (snapshot := Path(config).parent) and _holds_weights(snapshot):
        return ResolvedModel(str(snapshot), name, local=True)
    # `models/lama` beside a folder `models/llama` is a slip in a path rather than an id.
    if path.parent.is_dir() and did_you_mean(path.name, _entries(path.parent)):
        return None
    _ask_hub(spec)
    return ResolvedModel(spec, name, local=False)


def _ask_hub(spec: str) -> None:
    """Ask the hub once whether it has a model, before anything is loaded from it with many tries.

    Raises ModelNotFoundError when it has not, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    known = [*CATALOG, *(model.name for model in installed())]
    hint = did_you_mean(spec.rpartition("/")[2], known)
    try:
        HfApi().model_info(spec, timeout=15)
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no model {spec!r} that you may read", hint or "check its name"
        ) from error
    except Exception as error:  # what a lost connection raises differs between versions
        raise ModelNotFoundError(
            f"the model {spec!r} is not on this machine, and the hub does not answer",
            hint or f"here are: {', '.join(dict.fromkeys(known))}; or give a folder or a .gguf file",
        ) from error


def _holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))


def _entries(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.is_dir() or one.suffix == ".gguf"]


def _not_found(spec: str, path: Path) -> ModelNotFoundError:
    """Return the error for a `spec` that nothing fits."""
    known = [*CATALOG, *(model.name for model in installed())]
    hint = did_you_mean(spec, known)
    if hint is None and path.parent.is_dir():
        hint = did_you_mean(spec, [str(path.parent / name) for name in _entries(path.parent)])
    return ModelNotFoundError(
        f"no model {spec!r}: no folder, no .gguf file and no known name",
        hint or f"known names: {', '.join(dict.fromkeys(known))}; or a folder, a .gguf file, a Hugging Face id",
    )
