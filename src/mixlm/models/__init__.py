"""Models by name, folder or GGUF file: finding, fetching, converting and caching them."""

from mixlm.models.cache import InstalledModel, ModelMetadata, cache_root, find, installed, read_info, remove
from mixlm.models.catalog import CATALOG, GROUPS, CatalogModel
from mixlm.models.convert import DTYPES, convert_gguf, converted
from mixlm.models.fetch import get
from mixlm.models.gguf import GgufModel, find_gguf, tokenizer_folder
from mixlm.models.resolve import ResolvedModel, resolve

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
