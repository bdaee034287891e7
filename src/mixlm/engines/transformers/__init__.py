"""Models through transformers: safetensors, on CPUs and CUDA. Nothing here imports torch before a model is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mixlm.engines.base import EngineSpec
from mixlm.errors import ConfigError, ModelLoadError
from mixlm.models.resolve import resolve

if TYPE_CHECKING:
    from mixlm.engines.transformers.engine import HFEngine


def load(spec: EngineSpec) -> HFEngine:
    """Load a folder, a catalogue name or a hub id: see `HFEngine.from_pretrained`."""
    source, name = find_model(spec)
    from mixlm.engines.transformers.engine import HFEngine

    return HFEngine.from_pretrained(replace(spec, name=name), source)


def find_model(spec: EngineSpec, *, weights: bool = True) -> tuple[str, str]:
    """Return the folder or hub id of the model that a spec names, and its name.

    weights: whether those of a revision are fetched too, not only what describes it.

    Raises:
        ConfigError: there is a revision, and the model is no hub id.
        ModelNotFoundError, ModelLoadError: there is no such model, or it cannot be fetched.
    """
    resolved = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16", spec.revision)
    source, name = resolved.path_or_id, spec.name or resolved.name
    if spec.revision is None:
        return source, name
    if not resolved.on_hub:
        raise ConfigError(
            f"revision is given, and {spec.model} is on this machine", "leave it out; revisions are of hub ids"
        )
    if not resolved.local:
        source = _fetch_revision(source, spec.revision, weights=weights)
    return source, name


def _fetch_revision(hub_id: str, revision: str, *, weights: bool) -> str:
    """Return the folder of a revision of a hub id, fetched where it is not in the cache. Raises ModelLoadError.

    weights: whether they are fetched too, not only what describes the model.
    """
    from huggingface_hub import snapshot_download

    from mixlm.engines.tokenizer_setup import error_summary

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        folder: str = snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise ModelLoadError(
            f"revision {revision!r} of {hub_id} cannot be fetched: {error_summary(error)}",
            "give a branch, a tag or a commit of the repository",
        ) from error
    return folder
