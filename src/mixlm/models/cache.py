"""The cache of models on this machine: what is in it, and how models come into it, whole and built by one process.

The cache is `$MIXLM_CACHE`, else `$XDG_CACHE_HOME/mixlm`, else `~/.cache/mixlm`. A model is a Hugging Face folder in
`models/<name>/` with an additional `mixlm.json`. A rename puts it there once it is complete. What was
computed of large files elsewhere is kept in indexes, by their path, size and time of change (`remembered`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlm.errors import ModelLoadError, ModelNotFoundError, did_you_mean

if TYPE_CHECKING:
    from mixlm.terminal import ProgressDisplay

INFO_FILE = "mixlm.json"
GGUF_FILE = "model.gguf"  # the fetched file, in the folder of the model made from it
TOKENIZER_VERSION = 6  # increases when the conversion of tokenizers changes


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


def cache_root() -> Path:
    """Return the cache folder, which may not exist yet."""
    if cache := os.environ.get("MIXLM_CACHE"):
        return Path(cache).expanduser().absolute()
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent).expanduser().absolute() / "mixlm"
    return Path.home() / ".cache" / "mixlm"


def file_name(path: Path) -> str:
    """Return a name for the folder of what is made from a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-") or "model"


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


def remembered(path: Path, index: str, compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns, from an index if the file has not changed since.

    Args:
        path: The file.
        index: Name of the index, a JSON file in the cache.
        compute: Computes what JSON can hold of the file.

    Raises:
        OSError: There is no such file.
    """
    index_file = cache_root() / index
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    try:
        entries = dict(json.loads(index_file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        entries = {}
    if key not in entries:
        entries[key] = compute()
        # The index is only a cache; that it cannot be written is reported later.
        with suppress(OSError):
            entries = {entry: value for entry, value in entries.items() if os.path.exists(entry.rsplit("|", 2)[0])}
            index_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(index_file, entries)
    return entries[key]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON; see `write_bytes`."""
    write_bytes(path, (json.dumps(value) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # a cache may be another user's
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


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


def install(name: str, build: Callable[[Path], ModelMetadata], display: ProgressDisplay) -> InstalledModel:
    """Return the model `name`; build it if it is not installed.

    If several processes need it at the same time, one builds it and the others wait.

    Args:
        name: The name of the model's folder in the cache.
        build: Fills a folder with the model and returns the content of `mixlm.json`.
        display: Shows if another process is building the model.

    Raises:
        ModelLoadError: The cache cannot be written, or a folder of that name is not a model.
    """
    if model := find(name):
        return model
    folder = model_folder(name)
    build_folder(folder, build, display)
    if model := find(name):
        return model
    raise ModelLoadError(f"{folder} has a {INFO_FILE}, and no model", "move that folder elsewhere")


def build_folder(folder: Path, build: Callable[[Path], ModelMetadata], display: ProgressDisplay) -> None:
    """Build a folder of the cache, unless it is there: see `install`."""
    with _report_os_errors(), locked(folder.name, display):
        if read_info(folder) is not None:
            return
        if folder.exists():
            raise ModelLoadError(f"{folder} is in the way: mixlm did not create it", "move that folder elsewhere")
        with _workspace(folder) as target:
            write_info(target, build(target))
            _set_modes(target)
            target.rename(folder)


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


def locked(name: str, display: ProgressDisplay) -> AbstractContextManager[None]:
    """Hold the lock of one model."""
    from mixlm.resumable_log import exclusive

    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    waiting = display.stage(f"{name}: waiting for another process that is building it")
    return exclusive(locks / f"{name}.lock", waiting)


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """Create a folder for a build on the same disk as the folder that is built, so that a rename can finish it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.building-"
    # The lock is held, so an earlier build of this name was killed.
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as work:
        target = Path(work, "target")
        target.mkdir()
        yield target


def _set_modes(folder: Path) -> None:
    """Set the usual modes: some libraries write files that only their owner can read."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
