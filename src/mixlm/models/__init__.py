"""Models by name, folder or GGUF file: finding, fetching, converting and caching them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixlm.models.resolve import ResolvedModel, resolve

if TYPE_CHECKING:
    from mixlm.models.cache import InstalledModel, ModelMetadata, cache_root, find, installed, read_info, remove
    from mixlm.models.catalog import CATALOG, GROUPS, CatalogModel
    from mixlm.models.convert import DTYPES, convert_gguf, converted
    from mixlm.models.fetch import get
    from mixlm.models.gguf import GgufModel, find_gguf, tokenizer_folder

__all__ = [
    "CATALOG",
    "DTYPES",
    "GROUPS",
    "CatalogModel",
    "GgufModel",
    "InstalledModel",
    "ModelMetadata",
    "ResolvedModel",
    "cache_root",
    "convert_gguf",
    "converted",
    "find",
    "find_gguf",
    "get",
    "installed",
    "read_info",
    "remove",
    "resolve",
    "tokenizer_folder",
]

_MODULES = {
    "cache": ("InstalledModel", "ModelMetadata", "cache_root", "find", "installed", "read_info", "remove"),
    "catalog": ("CATALOG", "GROUPS", "CatalogModel"),
    "convert": ("DTYPES", "convert_gguf", "converted"),
    "fetch": ("get",),
    "gguf": ("GgufModel", "find_gguf", "tokenizer_folder"),
}


def __getattr__(name: str) -> Any:
    """Import names when they are first used: converting and fetching are rarely needed."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"mixlm.models.{module}"), name)
    raise AttributeError(f"module 'mixlm.models' has no attribute {name!r}")
