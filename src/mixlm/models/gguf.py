"""GGUF files: where one is, its tokenizer, and its weights in a Hugging Face folder, dequantized, which loads fast."""

from __future__ import annotations

import gc
import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError, MixlmError, ModelLoadError, ModelNotFoundError, close_matches
from mixlm.models.cache import (
    GGUF_FILE,
    INFO_FILE,
    TOKENIZER_VERSION,
    ModelMetadata,
    build_folder,
    cache_root,
    file_name,
    find,
    install,
    locked,
    model_folder,
    read_info,
    remembered,
    write_info,
)
from mixlm.models.gguf_tokenizer import write_tokenizer
from mixlm.models.header import GgufHeader, read_header, read_metadata
from mixlm.terminal import ProgressDisplay, Stage

CONVERTED_DTYPES = ("bfloat16", "float16", "float32")
_CHUNK = 1 << 20


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


def convert_gguf(path: Path, target_dir: Path, dtype: str = "bfloat16", stage: Stage | None = None) -> None:
    """Convert the weights of the GGUF file at `path` into a Hugging Face folder.

    Args:
        path: The GGUF file.
        target_dir: An empty folder for the model.
        dtype: The dtype of the weights: "bfloat16", "float16" or "float32".
        stage: Shows the progress.

    Raises:
        ModelLoadError: The file is broken, or contains a model that cannot be converted.
    """
    header = read_header(path)
    try:
        with _conversion_errors(path, header):
            _convert(path, target_dir, dtype, header.tokens, stage or Stage())
    finally:
        gc.collect()


@contextmanager
def _conversion_errors(path: Path, header: GgufHeader) -> Iterator[None]:
    """Turn what goes wrong in a conversion into a ModelLoadError."""
    try:
        yield
    except MixlmError:
        raise
    except Exception as error:
        # For unknown architectures the library raises ValueError, for other unexpected files KeyError, RuntimeError
        # and others.
        raise ModelLoadError(
            f"cannot convert {path} (GGUF architecture {header.architecture!r}): {_one_sentence(error)}",
            "a folder with the same model in safetensors may load",
        ) from error


def converted(path: Path, dtype: str = "bfloat16", display: ProgressDisplay | None = None) -> Path:
    """Return the cached Hugging Face folder of a GGUF file, converting it the first time.

    Raises:
        ConfigError: The dtype is none to which models can be converted.
        ModelNotFoundError: There is no such file.
        ModelLoadError: The file is broken, or contains a model that cannot be converted.
    """
    if dtype not in CONVERTED_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not allowed; allowed: {', '.join(CONVERTED_DTYPES)}")
    path = Path(path).expanduser().absolute()
    check_gguf(path)
    display = display or ProgressDisplay()
    require_libraries()
    read_header(path)
    sha256 = checksum(path, display)

    def build(target: Path) -> ModelMetadata:
        with display.stage(f"{path.name}: converting, once", unit="items") as stage:
            convert_gguf(path, target, dtype, stage)
            stage.pulse(f"{path.name}: writing the tokenizer")
            return add_tokenizer(path, target, source=str(path), sha256=sha256, dtype=dtype)

    return ensure_tokenizer(install(f"{file_name(path)}-{sha256[:12]}-{dtype}", build, display).path, path)


def ensure_weights(folder: Path) -> Path:
    """Return a model's folder in the cache with weights that transformers can load.

    A model is fetched as a GGUF file; its weights are converted when an engine first needs them.

    Raises:
        ModelLoadError: The file is broken, or contains a model that cannot be converted.
    """
    if (folder / "config.json").is_file() or not (folder / GGUF_FILE).is_file():
        return folder
    require_libraries()
    display = ProgressDisplay()
    with locked(folder.name, display):
        if (folder / "config.json").is_file():
            return folder
        with _added_to(folder) as files, display.stage(f"{folder.name}: converting, once", unit="items") as stage:
            convert_gguf(folder / GGUF_FILE, files, "bfloat16", stage)
    return folder


def ensure_tokenizer(folder: Path, gguf: Path | None = None) -> Path:
    """Return a model's folder in the cache, with its tokenizer converted by this version of mixlm.

    Args:
        folder: The folder.
        gguf: The GGUF file of the model; if it is unknown or missing, the tokenizer is left as it is.
    """
    info = read_info(folder)
    source = gguf or folder / GGUF_FILE
    if info is None or info.tokenizer == TOKENIZER_VERSION or not source.is_file():
        return folder
    with _added_to(folder) as files:
        write_tokenizer(read_metadata(source), files, source.name)
    write_info(folder, replace(info, tokenizer=TOKENIZER_VERSION))
    return folder


@contextmanager
def _added_to(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files then go to another one, config.json last: it marks that one as complete."""
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json"):
            file.chmod(0o644)
            file.replace(folder / file.name)


def add_tokenizer(
    path: Path, folder: Path, *, source: str, sha256: str, dtype: str, licence: str | None = None
) -> ModelMetadata:
    """Write the tokenizer of a GGUF file into a folder, and return the content of the folder's `mixlm.json`."""
    metadata = read_metadata(path)
    header = GgufHeader.of(metadata)
    with _conversion_errors(path, header):
        write_tokenizer(metadata, folder, path.name)
    return ModelMetadata(
        source=source,
        sha256=sha256,
        dtype=dtype,
        architecture=header.architecture,
        control=header.control,
        ends=header.ends,
        context=header.context,
        licence=licence,
        tokenizer=TOKENIZER_VERSION,
    )


def require_libraries() -> None:
    """Raise ModelLoadError if a library for the conversion is missing, before long work starts."""
    missing = [name for name in ("torch", "transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelLoadError(f"reading GGUF models needs {', '.join(missing)}", "pip install 'mixlm[hf]'")


def check_gguf(path: Path) -> None:
    """Raise ModelNotFoundError for a GGUF file that is not there, with similar names, or what its folder has."""
    if path.is_file():
        return
    hint: str | None = f"there is no folder {path.parent}"
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        close = close_matches(path.name, names) or sorted(name for name in names if name.endswith(".gguf"))[:3]
        hint = f"{path.parent} holds {', '.join(close)}" if close else None
    raise ModelNotFoundError(f"no GGUF file at {path}", hint)


def _convert(path: Path, target: Path, dtype: str, tokens: int, stage: Stage) -> None:
    # In a folder of its own: a config.json or tokenizer next to the user's file may belong to another model.
    with tempfile.TemporaryDirectory(prefix="mixlm-") as folder, _progress_to(stage):
        (Path(folder) / GGUF_FILE).symlink_to(path.absolute())
        from transformers import AutoModelForCausalLM, GgufConfig

        stage.pulse(f"{path.name}: reading")
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF_FILE,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        _check_weights(path, model, loading)
        stage.pulse(f"{path.name}: writing the weights")
        model.save_pretrained(target)
        rows = model.get_input_embeddings().weight.shape[0]
        if tokens > rows:
            raise ModelLoadError(f"{path} has {tokens} tokens but embeddings for only {rows}")


def _check_weights(path: Path, model: Any, loading: dict[str, Any]) -> None:
    import torch

    # A weight that is missing from the file would be random.
    if missing := sorted(loading["missing_keys"]):
        raise ModelLoadError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}")
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelLoadError(f"{path}: the weight {name} has infinities or NaN in {weight.dtype}")


@contextmanager
def _progress_to(stage: Stage) -> Iterator[None]:
    """Silence transformers, and turn its progress bars into updates of `stage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import modeling_gguf_pytorch_utils as legacy
        from transformers.utils import logging

        class Counted(logging.EmptyTqdm):  # type: ignore[misc]
            def __iter__(self) -> Iterator[Any]:
                items = list(super().__iter__())
                for done, item in enumerate(items):
                    stage.update(done, len(items))
                    yield item
                stage.update(len(items), len(items))

        bar = getattr(legacy, "tqdm", None)
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        hook = logging.set_tqdm_hook(lambda _factory, items, options: Counted(*items, **options))
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        # One of the two GGUF loaders uses tqdm directly, regardless of the settings of the library.
        legacy.tqdm = Counted
        try:
            yield
        finally:
            legacy.tqdm = bar
            logging.set_verbosity(verbosity)
            logging.set_tqdm_hook(hook)
            if bars:
                logging.enable_progress_bar()


def checksum(path: Path, display: ProgressDisplay) -> str:
    """Return the SHA-256 of a file, from an index if the file has not changed since."""

    def compute() -> str:
        digest = hashlib.sha256()
        size = path.stat().st_size
        with path.open("rb") as file, display.stage(f"{path.name}: checksum", size, unit="bytes") as stage:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                stage.update(file.tell())
        return digest.hexdigest()

    return str(remembered(path, "gguf-index.json", compute))


def _one_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    text = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0] or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
