"""The cache of models on this machine.

The cache is `$MIXLM_CACHE`, else `$XDG_CACHE_HOME/mixlm`, else `~/.cache/mixlm`. A model is a Hugging Face folder in
`models/<name>/` with an additional `mixlm.json`. A rename puts it there once it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlm.errors import ModelLoadError, ModelNotFoundError, did_you_mean

if TYPE_CHECKING:
    from mixlm.terminal import ProgressDisplay

INFO_FILE = "mixlm.json"
GGUF_FILE = "model.gguf"  # the fetched file, in the folder of the model made from it
TOKENIZER_VERSION = 5  # increases when the conversion of tokenizers changes


@dataclass(frozen=True)
class ModelMetadata:
    """The content of `mixlm.json`: the source of a model, and what the rest of its folder does not contain."""

    source: str
    sha256: str
    dtype: str
    architecture: str
    control: tuple[int, ...]  # ids of control tokens
    ends: tuple[int, ...]  # ids that end a text, a turn or a message
    context: int | None
    licence: str | None = None
    tokenizer: int = 1  # `TOKENIZER_VERSION` of its tokenizer


@dataclass(frozen=True)
class InstalledModel:
    """A model in the cache."""

    name: str
    path: Path
    source: str
    size_bytes: int
    dtype: str
    licence: str | None


@dataclass(frozen=True)
class BuildFolders:
    """The folders in which a model is built; both are removed if the build fails."""

    scratch: Path  # for temporary files
    target: Path  # becomes the model's folder


def cache_root() -> Path:
    """Return the cache folder, which may not exist yet."""
    if cache := os.environ.get("MIXLM_CACHE"):
        return Path(cache).expanduser().absolute()
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent).expanduser().absolute() / "mixlm"
    return Path.home() / ".cache" / "mixlm"


def model_folder(name: str) -> Path:
    """Return the folder of the model `name`, which may not exist."""
    return cache_root() / "models" / name


def read_info(folder: Path) -> ModelMetadata | None:
    """Return the content of `mixlm.json`; None for a folder that mixlm did not create.

    Raises:
        ModelLoadError: It is broken, or of a newer mixlm.
    """
    file = folder / INFO_FILE
    if not os.path.isfile(file):  # False for what is no path, too
        return None
    try:
        raw = json.loads(file.read_text("utf-8"))
        if unknown := sorted(raw.keys() - ModelMetadata.__dataclass_fields__.keys()):
            raise ValueError(f"it has {', '.join(unknown)}, which this version does not know")
        ids = {name: tuple(map(index, raw[name])) for name in ("control", "ends")}
        return ModelMetadata(**{**raw, **ids})
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise ModelLoadError(
            f"{file} cannot be read: {reason}",
            "update mixlm if a newer one wrote it; else move the folder away, and fetch or convert the model again",
        ) from error


def write_info(folder: Path, info: ModelMetadata) -> None:
    """Write `mixlm.json` into a folder."""
    write_json(folder / INFO_FILE, asdict(info))


def find(name: str) -> InstalledModel | None:
    """Return the installed model `name`, or None. Raises ModelLoadError where its `mixlm.json` is broken."""
    # A path could lead out of the cache; a leading dot marks an unfinished build.
    if not name or name.startswith(".") or Path(name).name != name:
        return None
    folder = model_folder(name)
    info = read_info(folder)
    if info is None or not any((folder / file).is_file() for file in ("config.json", GGUF_FILE)):
        return None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return InstalledModel(name, folder, info.source, size, info.dtype, info.licence)


def is_converted(folder: Path) -> bool:
    """Whether a model's folder has weights that transformers can load, and a tokenizer of this version."""
    info = read_info(folder)
    return info is not None and info.tokenizer == TOKENIZER_VERSION and (folder / "config.json").is_file()


def installed() -> list[InstalledModel]:
    """Return the models in the cache, by name, but for those that cannot be used."""
    try:
        names = sorted(entry.name for entry in model_folder("").iterdir())
    except OSError:
        return []
    models = []
    for name in names:
        with suppress(ModelLoadError):
            models.append(find(name))
    return [model for model in models if model is not None]


def remove(name: str, display: ProgressDisplay) -> InstalledModel:
    """Remove an installed model, and return what it was.

    Raises:
        ModelNotFoundError: No model of this name is in the cache.
        ModelLoadError: The cache cannot be written.
    """
    with _report_os_errors():
        model = find(name)
        if model is None:
            names = [other.name for other in installed()]
            hint = did_you_mean(name, names) or (f"installed: {', '.join(names)}" if names else "nothing is installed")
            raise ModelNotFoundError(f"no model {name!r} is installed in {cache_root()}", hint)
        with locked(name, display):
            # Renamed first, so that nobody finds a half of it.
            doomed = Path(tempfile.mkdtemp(prefix=f".{name}.building-", dir=model.path.parent))
            model.path.rename(doomed / name)
            shutil.rmtree(doomed)
    return model


def install(name: str, build: Callable[[BuildFolders], ModelMetadata], display: ProgressDisplay) -> InstalledModel:
    """Return the model `name`; build it if it is not installed.

    If several processes need it at the same time, one builds it and the others wait.

    Args:
        name: The name of the model's folder in the cache.
        build: Fills `target` with the model and returns the content of `mixlm.json`.
        display: Shows if another process is building the model.

    Raises:
        ModelLoadError: The cache cannot be written, or a folder of that name is not a model.
    """
    if model := find(name):
        return model
    with _report_os_errors(), locked(name, display):
        if model := find(name):
            return model
        folder = model_folder(name)
        if folder.exists():
            raise ModelLoadError(f"{folder} is in the way: mixlm did not create it", "move that folder elsewhere")
        with _workspace(name) as build_folders:
            info = build(build_folders)
            write_info(build_folders.target, info)
            _set_modes(build_folders.target)
            build_folders.target.rename(folder)
    if model := find(name):
        return model
    raise ModelLoadError(f"{folder} was written without a model", "report this as a bug")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically: readers see the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def _report_os_errors() -> Iterator[None]:
    """Turn errors of the file system into one that names the cache and a remedy."""
    try:
        yield
    except OSError as error:
        raise ModelLoadError(
            f"cannot write to the model cache {cache_root()}: {error.strerror or error}",
            "free some space, or set MIXLM_CACHE to another folder that you can write to",
        ) from error


@contextmanager
def locked(name: str, display: ProgressDisplay) -> Iterator[None]:
    """Hold the lock of one model. Its file remains: if it were removed, two processes could hold the lock."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with display.stage(f"{name}: waiting for another process that is building it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _workspace(name: str) -> Iterator[BuildFolders]:
    """Create the folders of a build on the same disk as the models, so that a rename can finish it."""
    models = model_folder("")
    models.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.building-"
    # The lock is held, so an earlier build of this name was killed.
    for folder in models.glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=models))
    try:
        build = BuildFolders(work / "scratch", work / "target")
        build.scratch.mkdir()
        build.target.mkdir()
        yield build
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _set_modes(folder: Path) -> None:
    """Set the usual modes: some libraries write files that only their owner can read."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
