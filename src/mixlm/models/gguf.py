"""The GGUF file of a model, for engines that run it directly, and its converted tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixlm.models.cache import GGUF_FILE, INFO_FILE, ModelMetadata, cache_root, file_name, find, model_folder, read_info
from mixlm.models.convert import CONVERTED_DTYPES, add_tokenizer, check_gguf, checksum, ensure_tokenizer
from mixlm.models.header import read_header
from mixlm.models.install import build_folder
from mixlm.terminal import ProgressDisplay


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, the folder of its converted tokenizer if there is one, and a display name."""

    path: Path
    folder: Path | None
    name: str


def find_gguf(spec: str) -> GgufModel | None:
    """Return the GGUF file that `spec` names; None if it names something else.

    The name of a converted model means the file that it was converted from, if that file exists unchanged.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        return GgufModel(path.absolute(), None, path.stem) if path.is_file() else None
    installed = find(spec)
    is_model = path.is_dir() and any((path / file).is_file() for file in ("config.json", GGUF_FILE))
    folder = path.absolute() if is_model else installed.path if installed else None
    if folder is None or (info := read_info(folder)) is None:
        return None
    name = folder.name
    if (folder / GGUF_FILE).is_file():
        return GgufModel(folder / GGUF_FILE, folder, name)
    source = Path(info.source)
    is_there = source.suffix.lower() == ".gguf" and source.is_file()
    if is_there and checksum(source, ProgressDisplay()) == info.sha256:
        return GgufModel(source, folder, name)
    return None


def tokenizer_folder(model: GgufModel) -> Path:
    """Return a folder with the model's tokenizer, without weights; converts it the first time.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelLoadError: The file is broken, or its tokenizer cannot be converted.
    """
    if model.folder is not None:
        return ensure_tokenizer(model.folder, model.path)
    path, display = model.path, ProgressDisplay()
    check_gguf(path)
    read_header(path)
    sha256 = checksum(path, display)
    name = f"{file_name(path)}-{sha256[:12]}"
    converted = [model_folder(f"{name}-{dtype}") for dtype in CONVERTED_DTYPES]
    folder = cache_root() / "tokenizers" / name
    for candidate in (*converted, folder):
        if (candidate / INFO_FILE).is_file():
            return ensure_tokenizer(candidate, path)

    def build(target: Path) -> ModelMetadata:
        with display.stage(f"{path.name}: reading the tokenizer, once"):
            return add_tokenizer(path, target, source=str(path), sha256=sha256, dtype="none")

    build_folder(folder, build, display)
    return folder
