"""Engines without weights, for what is known of a GGUF file before it is loaded or converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixlm.engines import Engine, EngineSpec
from mixlm.engines import load as load_engine
from mixlm.engines.base import Session, TextInterface
from mixlm.engines.tokenizer_setup import TokenizerSetup
from mixlm.errors import UnsupportedError
from mixlm.models import find_gguf, tokenizer_folder
from mixlm.models.header import read_header


def load_described(spec: EngineSpec) -> Engine:
    """Return an engine without weights for a GGUF file; load any other model.

    Raises:
        ModelLoadError: The file is broken.
        TokenizerError: Its tokens cannot be mapped to bytes.
    """
    gguf = None if spec.adapter is not None or ":" in spec.model else find_gguf(spec.model)
    if gguf is None or spec.engine not in ("auto", "hf", "llamacpp"):
        return load_engine(spec)
    header = read_header(gguf.path)
    named = replace(spec, name=spec.name or gguf.name)
    text = TokenizerSetup.load(str(tokenizer_folder(gguf)), named.name).text_interface(
        named, header.tokens, header.ends
    )
    return UnloadedEngine(named, text, gguf.path, header.context)


class UnloadedEngine(Engine):
    """A GGUF file that has not been loaded: its tokenizer, prompts and size.

    Args:
        spec: What would be loaded.
        text: The tokenizer and the prompts.
        path: The file.
        context: The context length that the file states.
    """

    def __init__(self, spec: EngineSpec, text: TextInterface, path: Path, context: int | None) -> None:
        super().__init__(spec.name, text, spec.context or context or 1 << 20)
        in_llamacpp = spec.engine == "llamacpp"
        # As the loaded engine has it, so that the same methods are possible.
        self.top_k_limit = min(spec.candidates, self.vocabulary.size) if in_llamacpp else None
        self.weights_bytes = path.stat().st_size
        engine = "llama.cpp" if in_llamacpp else "transformers"
        self.details = {"engine": f"{engine}, not loaded", "dtype": "GGUF"}

    def session(self) -> Session:
        """Raise UnsupportedError."""
        raise UnsupportedError(f"{self.name} is not loaded, so it cannot be run")
