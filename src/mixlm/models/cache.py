"""Where models live on this machine.

The cache is `$MIXLM_CACHE`, else `$XDG_CACHE_HOME/mixlm`, else `~/.cache/mixlm`. A model is a plain Hugging Face folder
in `models/<name>/` with a `mixlm.json` beside its weights. It appears there by one rename, once complete.
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
from pathlib import Path
from typing import Any

from mixlm.errors import ModelLoadError
from mixlm.terminal import ProgressDisplay

INFO_FILE = "mixlm.json"
GGUF_FILE = "model.gguf"  # the file that a model was fetched as, beside what was made of it
TOKENIZER_VERSION = 2  # of how tokenizers are made from GGUF files


@dataclass(frozen=True)
class ModelInfo:
    """What `mixlm.json` says of a model: where it came from, and what its folder alone does not tell."""

    source: str
    sha256: str
    dtype: str
    architecture: str
    control: tuple[int, ...]  # token ids that steer and are never text
    ends: tuple[int, ...]  # token ids that end a text, a turn or a message
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
    """The two folders a model is built in; both go away when the build fails."""

    scratch: Path  # for anything needed on the way
    target: Path  # becomes the model's folder


def cache_root() -> Path:
    """Return the cache folder, which need not exist."""
    if own := os.environ.get("MIXLM_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "mixlm"
    return Path.home() / ".cache" / "mixlm"


def model_folder(name: str) -> Path:
    """Return where the model `name` lives, or would live."""
    return cache_root() / "models" / name


def read_info(folder: Path) -> ModelInfo | None:
    """Return what `mixlm.json` in `folder` says; None for a folder that mixlm did not make."""
    try:
        raw = json.loads((folder / INFO_FILE).read_text("utf-8"))
        return ModelInfo(**{**raw, "control": tuple(raw["control"]), "ends": tuple(raw["ends"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_info(folder: Path, info: ModelInfo) -> None:
    """Write `mixlm.json` into a folder."""
    write_json(folder / INFO_FILE, asdict(info))


def find(name: str) -> InstalledModel | None:
    """Return the installed model `name`, or None."""
    # A name that is a path would lead out of the cache, and one with a leading dot is a build under way.
    if not name or name.startswith(".") or Path(name).name != name:
        return None
    folder = model_folder(name)
    info = read_info(folder)
    if info is None or not any((folder / file).is_file() for file in ("config.json", GGUF_FILE)):
        return None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return InstalledModel(name, folder, info.source, size, info.dtype, info.licence)


def installed() -> list[InstalledModel]:
    """Return the models in the cache, by name."""
    try:
        names = sorted(entry.name for entry in model_folder("").iterdir())
    except OSError:
        return []
    return [model for name in names if (model := find(name))]


def install(name: str, build: Callable[[BuildFolders], ModelInfo], display: ProgressDisplay) -> InstalledModel:
    """Return the model `name`, building it when it is not installed.

    Of several processes that ask at once one builds, and the others wait for it.

    Args:
        name: the model's folder in the cache.
        build: fills `target` with the model and returns what to write into `mixlm.json`.
        display: told when another process is at work on the same model.
    """
    if found := find(name):
        return found
    with _writing(), locked(name, display):
        if found := find(name):
            return found
        folder = model_folder(name)
        if folder.exists():
            raise ModelLoadError(f"{folder} is in the way: mixlm did not make it", "move that folder elsewhere")
        with _workspace(name) as build_folders:
            info = build(build_folders)
            write_info(build_folders.target, info)
            _open_modes(build_folders.target)
            build_folders.target.rename(folder)
    if found := find(name):
        return found
    raise ModelLoadError(f"{folder} was written without a model", "report this: no model can be loaded from it")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader finds the old file or the new one, never half of it."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file)
            file.write("\n")
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


@contextmanager
def _writing() -> Iterator[None]:
    """Turn what the file system refuses into an error that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise ModelLoadError(
            f"cannot write to the model cache {cache_root()}: {error.strerror or error}",
            "free some space, or set MIXLM_CACHE to a folder with room and write permission",
        ) from error


@contextmanager
def locked(name: str, display: ProgressDisplay) -> Iterator[None]:
    """Hold the lock of one model. The file stays behind: removing it would let two processes hold it at once."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with display.stage(f"{name}: waiting for another process that is making it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _workspace(name: str) -> Iterator[BuildFolders]:
    """Make the folders of one build beside the finished models, so that finishing is a rename on one disk."""
    models = model_folder("")
    models.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.building-"
    # With the lock held, an earlier build of this name can only be one that was killed.
    for left in models.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=models))
    try:
        build = BuildFolders(work / "scratch", work / "target")
        build.scratch.mkdir()
        build.target.mkdir()
        yield build
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open_modes(folder: Path) -> None:
    """Give files the usual modes: some writers make theirs readable by their owner alone."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
