"""Models that are put into the cache, or removed: by one process at a time, and never by half."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mixlm.errors import ModelLoadError, ModelNotFoundError, did_you_mean
from mixlm.models.cache import (
    INFO_FILE,
    InstalledModel,
    ModelMetadata,
    cache_root,
    find,
    installed,
    model_folder,
    read_info,
    write_info,
)
from mixlm.resumable_log import exclusive
from mixlm.terminal import ProgressDisplay


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
