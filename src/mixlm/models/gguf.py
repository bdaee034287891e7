"""The GGUF file behind a model, for engines that run it as it is, and the tokenizer that was converted from it."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mixlm.errors import ModelLoadError, ModelNotFoundError
from mixlm.models.cache import GGUF_FILE, INFO_FILE, cache_root, find, model_folder, read_info, write_info
from mixlm.models.convert import DTYPES, checksum, model_info, near_paths, with_tokenizer
from mixlm.models.gguf_tokenizer import write_tokenizer
from mixlm.models.header import read_header, read_metadata
from mixlm.terminal import ProgressDisplay


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, the folder of its converted tokenizer where there is one already, and a name for display."""

    path: Path
    folder: Path | None
    name: str


def find_gguf(spec: str, display: ProgressDisplay | None = None) -> GgufModel | None:
    """Return the GGUF file that a user's `spec` stands for; None when it stands for something else, or for nothing.

    A converted model stands for the file that it was converted from, if that is still there unchanged.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        return GgufModel(path.absolute(), None, path.stem) if path.is_file() else None
    named = find(spec)
    whole = path.is_dir() and any((path / file).is_file() for file in ("config.json", GGUF_FILE))
    folder = path.absolute() if whole else named.path if named else None
    if folder is None or (info := read_info(folder)) is None:
        return None
    name = folder.name
    if (folder / GGUF_FILE).is_file():
        return GgufModel(folder / GGUF_FILE, folder, name)
    source = Path(info.source)
    if (
        source.suffix.lower() == ".gguf"
        and source.is_file()
        and checksum(source, display or ProgressDisplay()) == info.sha256
    ):
        return GgufModel(source, folder, name)
    return None


def tokenizer_folder(model: GgufModel, display: ProgressDisplay | None = None) -> Path:
    """Return a folder with the model's tokenizer, converting it the first time, without the weights.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelLoadError: the file is broken, or its tokenizer cannot be converted.
    """
    if model.folder is not None:
        return with_tokenizer(model.folder, model.path)
    path, display = model.path, display or ProgressDisplay()
    if not path.is_file():
        raise ModelNotFoundError(f"no GGUF file at {path}", near_paths(path))
    header = read_header(path)
    sha256 = checksum(path, display)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-") or "model"
    name = f"{stem}-{sha256[:12]}"
    whole = [model_folder(f"{name}-{dtype}") for dtype in DTYPES]
    folder = cache_root() / "tokenizers" / name
    for made in (*whole, folder):
        if (made / INFO_FILE).is_file():
            return with_tokenizer(made, path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
    except OSError as error:
        raise ModelLoadError(f"the cache {cache_root()} cannot be written: {error.strerror or error}") from error
    try:
        with display.stage(f"{path.name}: reading the tokenizer, once"):
            write_tokenizer(read_metadata(path), draft, path.name)
        write_info(draft, model_info(header, source=str(path), sha256=sha256, dtype="none"))
        draft.chmod(0o755)
        if not folder.exists():  # another process may have been faster
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
